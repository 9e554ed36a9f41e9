# pjax in Ray's pods, for deploy/kuberay-*.yaml; EXTRA is cuda13, cuda12 or tpu.
# docker build -f docker/ray.Dockerfile --build-arg EXTRA=tpu -t pjax:ray-tpu .
FROM python:3.11-slim-bookworm AS build
ARG EXTRA=cuda13
WORKDIR /src
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY pjax ./pjax
# jaxlib first and no isolated build: its headers are what the native CPU kernel is compiled with.
RUN python -m venv /opt/pjax \
 && /opt/pjax/bin/pip install --no-cache-dir -c constraints.txt 'setuptools>=77' jaxlib \
 && /opt/pjax/bin/pip install --no-cache-dir -c constraints.txt --no-build-isolation ".[ray,${EXTRA}]"

FROM python:3.11-slim-bookworm
# KubeRay's probes call wget.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 ray && install -d -o ray /cache
COPY --from=build /opt/pjax /opt/pjax
ENV PATH=/opt/pjax/bin:$PATH HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /home/ray
