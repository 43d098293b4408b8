# vllm-ascend 0.30.0rc2 (vLLM 0.30.0, CANN 9.2.0) with the dsv4_indexer backend, for one product:
#   A2   docker build -f docker/ascend.Dockerfile -t vllm-dsv4-indexer:a2 .
#   A3   ... --build-arg BASE=v0.30.0rc2-a3 ...
#   A5   ... --build-arg BASE=v0.30.0rc2-950dt --build-arg ARCHITECTURE=3510 ...
ARG BASE=v0.30.0rc2
FROM quay.io/ascend/vllm-ascend:${BASE}

WORKDIR /opt/vllm-dsv4-indexer
COPY . .

# The image's own GCC is 11; the CPU kernels want 12 (csrc/CMakeLists.txt).
# Our package alone: torch, vLLM and vllm-ascend are the image's. CANN's compiler needs its environment. Without CANN the
# build leaves the NPU's library out, so look whether it is there.
ARG ARCHITECTURE=2201
SHELL ["/bin/bash", "-c"]
RUN apt-get update -qq && apt-get install -qq -y --no-install-recommends g++-12 && rm -rf /var/lib/apt/lists/* \
    && source /usr/local/Ascend/ascend-toolkit/set_env.sh \
    && CXX=g++-12 SKBUILD_CMAKE_DEFINE=DSV4_ASCEND_ARCH=$ARCHITECTURE python3 -m pip install --no-cache-dir --no-deps . \
    && python3 -m pip install --no-cache-dir 'pytest>=9,<10' \
    && package=$(cd / && python3 -c 'import vllm_dsv4_indexer as package; print(package.__path__[0])') \
    && if ! test -f $package/libdsv4_indexer_ascend.so; then echo "the NPU library was not built"; exit 1; fi

ENV VLLM_NO_USAGE_STATS=1
EXPOSE 8000
ENTRYPOINT ["/bin/bash", "-c", "source /usr/local/Ascend/ascend-toolkit/set_env.sh && \
    source /usr/local/Ascend/nnal/atb/set_env.sh && \
    exec vllm serve --attention-backend dsv4_indexer \"$@\"", "vllm-serve"]
CMD ["--help"]
