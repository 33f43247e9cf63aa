"""A model loaded to score answers: log pi(y|x), as training scores them."""

from collections.abc import Iterator, Sequence

import numpy as np

from sera_plugin.config.quoting import quoted
from sera_plugin.data.text import RowError
from sera_plugin.model.budget import scoring_budget
from sera_plugin.model.scoring import score_sequences
from sera_plugin.tools.evaluation.chat import Chat
from sera_plugin.tools.evaluation.engine import load
from sera_plugin.tools.evaluation.models import Model


class Scores:
    """A model, ready to score (question, answer) pairs as its own template has them.

    A ValueError if it cannot be loaded, or gives an answer a likelihood that is no number.
    """

    def __init__(self, model: Model, prompt_format: str | None) -> None:
        self._name, self._chat = model.name, Chat(model, prompt_format)
        self._model = load(model)

    def __call__(
        self, asked: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[int, tuple[float, int] | None]]:
        """Yield (index, (nats, tokens)) of each, None where the model's context has no room."""
        chat, fits = self._chat, []
        prompts, completions = [], []
        for index, (question, answer) in enumerate(asked):
            try:
                prompt, completion = chat.answered(question, answer)
            except RowError as error:
                raise ValueError(f"{self._name}: the answer {quoted(answer)}: {error}") from None
            if chat.context is not None and len(prompt) + len(completion) > chat.context:
                yield index, None
                continue
            fits.append(index)
            prompts.append(prompt)
            completions.append(completion)
        if not fits:
            return
        longest = max(map(len, prompts)) + max(map(len, completions))
        found = score_sequences(
            self._model,
            prompts,
            completions,
            pad_id=chat.pad_id,
            budget=scoring_budget(self._model, self._model.device, longest),
        )
        for index, logp, completion in zip(fits, found.tolist(), completions, strict=True):
            if not np.isfinite(logp):
                raise ValueError(
                    f"{self._name} gives the answer {quoted(asked[index][1])} a log-probability of "
                    f"{logp}: its weights are damaged, or it has diverged in training."
                )
            yield index, (logp, len(completion))
