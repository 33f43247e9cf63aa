"""Who answers: candidates from the current policy, by transformers in process or by vLLM.

- `samplers`, `choose`   which of them samples and why; what another environment's vLLM can do
- `transformers`         in the training process
- `vllm`, `client`       a vLLM server, our own or a running one; what comes back is checked
- `child`, `lifeline`    a process that cannot outlive the training process
- `offload`              room on the accelerator for an engine
- `prompts`              their order, room after each, a bar
"""
