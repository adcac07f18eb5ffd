# Two images from one file: `--target cpu` (small) and `--target cuda` (torch with CUDA; the host
# brings the driver and the NVIDIA container toolkit).
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/starcast
ENV PATH=/opt/starcast/bin:$PATH
WORKDIR /build
COPY deploy/requirements.txt ./

FROM build AS build-cuda
RUN pip install --require-hashes -r requirements.txt
COPY . .
RUN pip install --no-deps .

# Everything as locked, but torch without CUDA: of the same version, from an index that serves such
# a build. Where none is named, pip's own configuration decides which torch this is.
FROM build AS build-cpu
ARG TORCH_INDEX_URL=
RUN awk '/^[a-z]/ { skip = /^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==/ } !skip' \
        requirements.txt > without-torch.txt \
    && pip install --no-deps --require-hashes -r without-torch.txt
RUN pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} \
        "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)"
COPY . .
RUN pip install --no-deps .

FROM ${PYTHON_IMAGE} AS runtime
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home starcast \
    && install --directory --owner starcast /data /data/archive /data/models
ENV PATH=/opt/starcast/bin:$PATH PYTHONUNBUFFERED=1
USER starcast
WORKDIR /data
EXPOSE 8080 9100
STOPSIGNAL SIGTERM
ENTRYPOINT ["starcast"]
CMD ["--help"]

# Triton builds a part of itself with a compiler when a worker first makes vectors.
FROM runtime AS cuda
USER root
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER starcast
COPY --from=build-cuda /opt/starcast /opt/starcast

FROM runtime AS cpu
COPY --from=build-cpu /opt/starcast /opt/starcast
