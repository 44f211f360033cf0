# vitprobe on a machine with NVIDIA GPUs. torch's wheels bring CUDA; the host needs a driver and the
# NVIDIA Container Toolkit.
#
#   docker build -t vitprobe .
#   docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/data" vitprobe --help
FROM python:3.12-slim

# Triton compiles its kernels, and torch.compile its own, where they are first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Dependencies first: they change less often than the code. Versions are those the tests passed with.
WORKDIR /opt/vitprobe
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir vitprobe && touch vitprobe/__init__.py \
    && pip install --no-cache-dir --constraint constraints.txt '.[hf,zarr]' tensorboard \
    && pip uninstall --yes vitprobe
COPY vitprobe vitprobe
RUN pip install --no-cache-dir --no-deps .

# Any user may run it; caches (timm's weights, compiled kernels) live in /cache, which can be mounted.
ENV HOME=/cache MPLCONFIGDIR=/cache/matplotlib PYTHONUNBUFFERED=1
RUN mkdir -m 1777 /cache
WORKDIR /data
ENTRYPOINT ["vitprobe"]
CMD ["--help"]
