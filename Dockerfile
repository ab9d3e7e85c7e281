# The image for workers in docker and kubernetes pools (docs/cluster.md): the environment, and a clone to run from.
#
#     docker build --build-arg ORIGIN=https://git.example.org/team/dualign.git -t dualign-worker .
#
# For GPUs, name an index with the CUDA build of torch that fits the driver of the nodes:
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
#
# With vLLM in /opt/vllm, an environment of its own (resources.engine_python: /opt/vllm/bin/python, docs/engines.md):
#     --build-arg VLLM=vllm==0.32.0

FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git openssh-client \
    && rm -rf /var/lib/apt/lists/*

# The packages first, so that a change of the code does not install them anew.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /dualign
COPY pyproject.toml constraints.txt README.md ./
RUN mkdir dualign \
    && pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" --constraint constraints.txt . dvc-s3 \
    && pip uninstall --yes dualign \
    && rm -r build dualign.egg-info

# What pip is to install for vLLM; unquoted, so that it may be several words. It loads libnuma and compiles with g++.
ARG VLLM=
RUN [ -z "$VLLM" ] \
    || { apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 g++ \
    && rm -rf /var/lib/apt/lists/* \
    && python -m venv /opt/vllm \
    && /opt/vllm/bin/pip install --no-cache-dir $VLLM; }

# Stages run commits that the clone fetches from here; mount credentials, or use an address that needs none. Folders that
# .dockerignore leaves out come back as git has them.
COPY . .
ARG ORIGIN
RUN : "${ORIGIN:?name it with --build-arg ORIGIN=ADDRESS}" \
    && (git remote set-url origin "$ORIGIN" || git remote add origin "$ORIGIN") \
    && git checkout --quiet -- data models reports

# Mount volumes here to keep, between stages, DVC's cache and the checkpoints of stages that were interrupted.
VOLUME ["/dualign/.dvc/cache", "/dualign/.scratch"]

ENV DUALIGN_ROOT=/dualign
