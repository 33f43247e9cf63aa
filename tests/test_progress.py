"""Bars on a terminal, lines in a log, and nothing from other ranks."""

import io
import logging
import re
import sys
from contextlib import suppress

import pytest
from tqdm import tqdm

from sera_plugin.algorithm.method import Candidate
from sera_plugin.rundir.progress import LOG, log_on_stderr, progress, told
from sera_plugin.sampling import samplers
from sera_plugin.sampling.samplers import sampling_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(samplers, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def log(caplog):
    """Lines of the log; standard error is no terminal under pytest."""
    caplog.set_level(logging.INFO, "axolotl.sera")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_short_phase_is_one_line_in_a_log(log, clock, capsys):
    with progress("score offline under theta_1", 12_000, "token") as advance:
        for _ in range(12):
            clock[0] += 4
            advance(1_000)
    with progress("score", 0, "token"):
        clock[0] += 120
    assert list(told([1, 2, 3], "tokenize", "pair")) == [1, 2, 3]
    assert log() == [
        "SeRA: score offline under theta_1: 12,000 tokens",
        "SeRA: score: 0 tokens",
        "SeRA: tokenize: 3 pairs",
    ]
    assert capsys.readouterr().err == ""


def test_a_long_phase_is_a_line_a_minute_and_one_at_its_end(log, clock):
    """Also while another bar lives, as the host's does."""
    bar = tqdm(total=2, file=io.StringIO())
    with bar, progress("score offline", 1_000, "token") as advance:
        for _ in range(10):
            clock[0] += 20
            advance(100, "a note")
    started, *lines, ended = log()
    assert started == "SeRA: score offline: 1,000 tokens"
    shares = [f"SeRA: score offline: {share}%" for share in (30, 60, 90)]
    assert [line.partition(" of ")[0] for line in lines] == shares
    assert lines[0].endswith("of 1000 [01:00<02:20,  5.00 token/s, a note]")
    assert ended.startswith("SeRA: score offline: 100% of 1000 [03:20<00:00")


def test_a_total_that_was_estimated_is_corrected_at_the_end_unless_the_phase_fails(log, clock):
    for fails in (False, True):
        with suppress(RuntimeError), progress("score", 1_000, "token") as advance:
            clock[0] += 120
            advance(700)
            if fails:
                raise RuntimeError
    first, second, ended, *failed = log()
    assert (first, second[:16]) == ("SeRA: score: 1,000 tokens", "SeRA: score: 70%")
    assert ended.startswith("SeRA: score: 100% of 700 ")
    assert failed[0] == first
    assert len(failed) == 2


def test_a_terminal_has_a_bar_with_the_rate_and_no_lines(log, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("score offline", 2_000, "token") as advance:
        advance(1_000, "a note")
        advance(1_000, "another")
    shown = sys.stderr.getvalue()
    assert re.search(r"SeRA: score offline: 100%\|.*2000/2000.* token/s, another\]\s*\n$", shown)
    assert log() == []


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_another_rank_shows_nothing(log, clock, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    with progress("score", 10, "token", quiet=True) as advance:
        clock[0] += 120
        advance(10, "a note")
    assert (sys.stderr.getvalue(), log()) == ("", [])


def test_sampling_tells_samples_and_tokens_per_second(log, clock):
    sample = Candidate([5, 6, 7], "stop")
    with sampling_progress(4, "sample", quiet=False) as advance:
        clock[0] += 60
        advance([(0, [sample] * 4), (1, [sample] * 4)])
        clock[0] += 1
        advance([(2, [sample] * 4), (3, [sample] * 4)])
    assert "50% of 4 [01:00<01:00, 30.00s/ prompt, 0.1 samples/s, 0 tok/s]" in log()[1]
    assert log()[2].startswith("SeRA: sample: 100% of 4 ")


def test_a_command_has_its_log_on_stderr_whatever_the_host_does_with_it(capsys, monkeypatch):
    host = logging.StreamHandler(sys.stdout)
    monkeypatch.setattr(logging.getLogger("axolotl"), "handlers", [host])
    before = (LOG.level, LOG.propagate, list(LOG.handlers))
    with log_on_stderr(), progress("judging", 3, "verdict"):
        pass
    assert (LOG.level, LOG.propagate, LOG.handlers) == before
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith("[INFO] [axolotl.sera] SeRA: judging: 3 verdicts\n")


def test_a_commands_log_goes_above_its_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with log_on_stderr(), progress("judging", 2, "verdict") as advance:
        advance(1)
        LOG.warning("a word")
    before, _, after = sys.stderr.getvalue().partition("[WARNING] [axolotl.sera] a word\n")
    assert "SeRA: judging:   0%" in before
    assert "SeRA: judging: " in after
