# An image with dit-moe and the language models' packages, in the locked versions:
#
#   docker build -t dit-moe .                                  torch as pip has it, for NVIDIA GPUs and CPUs
#   docker build -t dit-moe --build-arg TORCH_INDEX=URL .      another build of torch, CPU or a CUDA version
#   docker run --rm --gpus all --ipc host --user "$(id -u)" -v "$PWD:/work" dit-moe train digits
#
# URL is an index of wheels that the installation page of PyTorch names.
FROM python:3.12-slim

ARG TORCH_INDEX=""
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --uid 1000 user

WORKDIR /opt/dit_moe
COPY requirements/python3.12.txt requirements/
RUN if [ -n "$TORCH_INDEX" ]; then \
      grep -E '^torch(vision)?[<>=]' requirements/python3.12.txt > torch.txt \
      && pip install --index-url "$TORCH_INDEX" --requirement torch.txt; \
    fi
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY dit_moe dit_moe
RUN pip install --constraint requirements/python3.12.txt '.[lm]'

ENV HOME=/tmp
USER 1000
WORKDIR /work
ENTRYPOINT ["dit-moe"]
CMD ["--help"]
