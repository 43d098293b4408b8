# vLLM on CPU with the dsv4_indexer backend. The set-up is `make venv`, the same as outside a container.
#   docker build -f docker/cpu.Dockerfile -t vllm-dsv4-indexer:cpu .
#   docker run --rm -p 8000:8000 -v /path/to/checkpoint:/model:ro vllm-dsv4-indexer:cpu /model --kv-cache-memory-bytes 4G
FROM python:3.11.13-slim-bookworm

# g++ stays in the image: PyTorch compiles with it at run time when a user asks for compilation.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make libnuma1 \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home vllm
WORKDIR /home/vllm/vllm-dsv4-indexer
COPY --chown=vllm . .
RUN chown vllm .
USER vllm

# --build-arg TORCH_INDEX_URL=... names another index for the CPU build of torch.
ARG TORCH_INDEX_URL
RUN PIP_NO_CACHE_DIR=1 make venv

ENV PATH=/home/vllm/vllm-dsv4-indexer/.venv/bin:$PATH VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
EXPOSE 8000
ENTRYPOINT ["vllm", "serve", "--attention-backend", "dsv4_indexer"]
CMD ["--help"]
