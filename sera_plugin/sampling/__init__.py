"""Who answers: candidates from the current policy, by transformers in process or by vLLM.

- `samplers`           which of them samples and why; its bar
- `transformers`       in the training process
- `vllm`, `client`     a vLLM server, our own or a running one; what comes back is checked
- `child`, `lifeline`  another environment's Python; a process that cannot outlive this one
- `offload`            room on the accelerator for an engine
"""
