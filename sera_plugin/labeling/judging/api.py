"""Judges behind an OpenAI-compatible endpoint: two answers at a time, or one.

Every reply goes into a journal under a key of all that determines it, before it is used: judging
that was cut off or is done again asks for nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from threading import Event
from typing import TypeVar

from sera_plugin.config.judge import JudgeConfig
from sera_plugin.labeling.judging import (
    Answered,
    Comparison,
    Judge,
    JudgeFailed,
    ScoringJudge,
    Usage,
    Verdict,
)
from sera_plugin.labeling.judging.client import ChatClient, Message, Refused
from sera_plugin.labeling.judging.prompts import (
    REMINDERS,
    parse_rating,
    parse_verdict,
    read_template,
)
from sera_plugin.rundir.journal import Journal, key_of

#: Replies to one question before its verdict is given up.
REPLIES = 3
#: An endpoint that refuses that many requests, and has answered none, refuses all of them.
REFUSALS = 10

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Asking:
    """Asks for one kind of verdict until a reply has one, through the journal."""

    def __init__(
        self,
        config: JudgeConfig,
        journal: Journal,
        parse: Callable[[str], float | None],
    ) -> None:
        self.config = config
        self.template = read_template(config.mode, config.template)
        self._client = ChatClient(config)
        self._journal = journal
        self._parse = parse
        self._refusal = ""

    def verdict(self, values: dict[str, str], stop: Event) -> tuple[float | None, Usage]:
        """What the judge says of these texts, None if it says nothing that can be read."""
        usage = Usage()
        messages: list[Message] = [{"role": "user", "content": self.template.fill(values)}]
        for _ in range(REPLIES):
            try:
                text = self._reply(messages, usage, stop)
            except Refused as refusal:
                self._refusal = str(refusal)
                usage.refused += 1
                return None, usage
            value = self._parse(text)
            if value is not None:
                return value, usage
            usage.malformed += 1
            messages += [
                # Some endpoints take no empty message.
                {"role": "assistant", "content": text or "(nothing)"},
                {"role": "user", "content": REMINDERS[self.config.mode]},
            ]
        usage.unparsed += 1
        return None, usage

    def _reply(self, messages: list[Message], usage: Usage, stop: Event) -> str:
        config = self.config
        key = key_of(config.base_url, config.model, config.request, messages)
        found = self._journal.get(key)
        if found is None:
            reply = self._client.ask(messages, stop)
            found = {"model": config.model, **vars(reply)}
            usage.retries += found.pop("retries")
            self._journal.add(key, found)
            counted = usage.asked
        else:
            counted = usage.cached
        counted.count += 1
        counted.prompt_tokens += found["prompt_tokens"]
        counted.completion_tokens += found["completion_tokens"]
        text: str = found["text"]
        return text

    def each(
        self,
        items: Sequence[Item],
        work: Callable[[Item, Event], tuple[Result, Usage]],
        total: Usage,
    ) -> Iterator[tuple[int, Result]]:
        """Yield (index, result) of every item, worked on in threads; count what that takes.

        Raises:
            JudgeFailed: if one cannot be worked on, once what was under way has ended.
        """
        stop = Event()
        waiting = iter(enumerate(items))
        running: dict[Future[tuple[Result, Usage]], int] = {}
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            try:
                while True:
                    for index, item in islice(waiting, self.config.concurrency - len(running)):
                        running[pool.submit(work, item, stop)] = index
                    if not running:
                        break
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        index = running.pop(future)
                        result, usage = future.result()
                        total.add(usage)
                        self._check_refusals(total, REFUSALS)
                        yield index, result
                self._check_refusals(total, 1)
            finally:
                stop.set()

    def _check_refusals(self, total: Usage, most: int) -> None:
        if total.refused >= most and not total.asked.count + total.cached.count:
            raise JudgeFailed(
                f"the judge at {self.config.base_url} has refused all of the first "
                f"{total.refused} requests; the last time {self._refusal}. Check model, and what "
                "request sends."
            )


class PairwiseJudge:
    """Shows both answers, in both orders. Two equal answers tie without being shown.

    Args:
        config: of an API judge in mode `pairwise`.
        journal: where replies are kept.
    """

    def __init__(self, config: JudgeConfig, journal: Journal) -> None:
        self.name = config.model
        self.description = config.model_dump(mode="json")
        self.usage = Usage()
        self._asking = _Asking(config, journal, parse_verdict)

    def compare(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        """See `Judge.compare`."""
        return self._asking.each(comparisons, self._compare, self.usage)

    def _compare(self, one: Comparison, stop: Event) -> tuple[Verdict, Usage]:
        if one.first == one.second:
            return Verdict((0.5, 0.5)), Usage()
        first, usage = self._show(one.question, one.first, one.second, stop)
        second, more = self._show(one.question, one.second, one.first, stop)
        usage.add(more)
        return Verdict((first, None if second is None else 1.0 - second)), usage

    def _show(
        self, question: str, answer_a: str, answer_b: str, stop: Event
    ) -> tuple[float | None, Usage]:
        texts = {"question": question, "answer_a": answer_a, "answer_b": answer_b}
        return self._asking.verdict(texts, stop)


class RatingJudge(ScoringJudge):
    """Rates one answer at a time, from 1 to 10.

    Args:
        config: of an API judge in mode `single`.
        journal: where replies are kept.
    """

    def __init__(self, config: JudgeConfig, journal: Journal) -> None:
        super().__init__(config.model, config.model_dump(mode="json"))
        self._asking = _Asking(config, journal, parse_rating)

    def score(self, answers: Sequence[Answered]) -> Iterator[tuple[int, float | None]]:
        """See `ScoringJudge.score`."""
        return self._asking.each(answers, self._rate, self.usage)

    def _rate(self, one: Answered, stop: Event) -> tuple[float | None, Usage]:
        return self._asking.verdict({"question": one.question, "answer": one.answer}, stop)


def api_judge(config: JudgeConfig, journal: Journal) -> Judge:
    """The judge that a configuration describes.

    Raises:
        ValueError, OSError: for a template that cannot be used.
        JudgeFailed: if the key's environment variable is not there.
    """
    if config.mode == "single":
        return RatingJudge(config, journal)
    return PairwiseJudge(config, journal)
