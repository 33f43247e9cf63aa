"""Who answers: candidates from the current policy, by transformers in process or by vLLM.

- `samplers`           which of them samples and why; its bar
- `transformers`       in the training process
- `engine`, `client`   a vLLM server and how it is asked; what comes back is checked
- `vllm`, `servers`    which one: a child of the run's, or one that runs already
- `child`, `lifeline`  another environment's Python; a process that cannot outlive this one
- `offload`            room on the accelerator for an engine
"""
