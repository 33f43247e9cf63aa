"""Who answers: candidates from the current policy, by transformers in process or by vLLM.

- `samplers`, `choose`   which of them samples, and why
- `transformers`         in the training process
- `vllm`, `child`, `vllm_worker`   an engine in a child process
- `vllm_server`          a server that runs already
- `offload`              room on the accelerator for an engine
- `prompts`, `progress`  the order of prompts, room after each; a bar
"""
