# Axolotl's own image with SeRA in it (docs/install.md):
#   docker build -t sera .
#   docker run --gpus all --ipc=host -v "$PWD":/data -w /data sera axolotl train config.yaml
ARG AXOLOTL=axolotlai/axolotl-uv:0.19.0
FROM ${AXOLOTL}

COPY --chown=ubuntu . /workspace/sera_plugin
ARG UV_ARGS=""
# Against the image's own setuptools: nothing else is fetched that it has.
RUN uv pip install --no-build-isolation ${UV_ARGS} /workspace/sera_plugin
RUN axolotl sera --version

# vLLM pins other versions than Axolotl. `--build-arg VLLM=vllm` puts one beside it; a YAML then has
#   sera: {vllm_python: /workspace/vllm/bin/python}
ARG VLLM=""
RUN if [ -n "${VLLM}" ]; then uv venv /workspace/vllm && uv pip install --python /workspace/vllm "${VLLM}"; fi
