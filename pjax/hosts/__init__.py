"""Several hosts as one instance: they find each other, agree, hear what rank 0 plans, and end together (docs/multi_host.md).

Of models and steps nothing here knows.
"""

from pjax.hosts.group import Group as Group
from pjax.hosts.join import join as join
from pjax.hosts.place import Place as Place
from pjax.hosts.place import find_place as find_place
