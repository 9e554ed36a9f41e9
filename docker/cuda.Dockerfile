# pjax on NVIDIA GPUs; CUDA comes with JAX's wheels, the driver (580 or newer) from the host.
# docker build -f docker/cuda.Dockerfile -t pjax:cuda .  &&  docker run --gpus all --ipc host -p 8000:8000 -v pjax:/cache pjax:cuda MODEL
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY pjax ./pjax
# jaxlib first and no isolated build: its headers are what the native CPU kernel is compiled with.
RUN python -m venv /opt/pjax \
 && /opt/pjax/bin/pip install --no-cache-dir -c constraints.txt 'setuptools>=77' jaxlib \
 && /opt/pjax/bin/pip install --no-cache-dir -c constraints.txt --no-build-isolation '.[server,cuda13]'

FROM python:3.11-slim-bookworm
COPY --from=build /opt/pjax /opt/pjax
RUN useradd --create-home --uid 1000 pjax && install -d -o pjax /cache
ENV PATH=/opt/pjax/bin:$PATH HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache PYTHONUNBUFFERED=1 JAX_PLATFORMS=cuda
USER 1000:1000
WORKDIR /home/pjax
# Checkpoints and compiled steps outlive the container.
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["pjax", "serve", "--host", "0.0.0.0"]
