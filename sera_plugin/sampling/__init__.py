"""Who answers: candidates from the current policy, by transformers in process or by vLLM.

- `samplers`, `choose`   which of them samples, and why
- `transformers`         in the training process
- `vllm`                 a server of its own, for the phase
- `vllm_server`          a server that runs already
- `client`, `answers`    one HTTP client for both; what comes back is checked
- `child`, `lifeline`    a process that cannot outlive the training process
- `interpreter`          what another environment's vLLM can do
- `offload`              room on the accelerator for an engine
- `prompts`, `progress`  the order of prompts, room after each; a bar
"""
