"""What one request asks for. Every field is applied or refused."""

from pjax.params.beam import BeamSearchParams as BeamSearchParams
from pjax.params.limits import MAX_CANDIDATES as MAX_CANDIDATES
from pjax.params.limits import MAX_LOGPROBS as MAX_LOGPROBS
from pjax.params.limits import MAX_N as MAX_N
from pjax.params.limits import MAX_SEED as MAX_SEED
from pjax.params.limits import MAX_STOP_STRINGS as MAX_STOP_STRINGS
from pjax.params.logit_rules import LogitRules as LogitRules
from pjax.params.sampling import SamplingParams as SamplingParams
