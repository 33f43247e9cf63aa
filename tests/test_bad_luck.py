"""What a machine does to a run: full disks, no memory, numbers that are none, another run."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from sera_plugin.algorithm.method import SamplingSettings
from sera_plugin.model.budget import TokenBudget
from sera_plugin.model.forward import abilities
from sera_plugin.model.scoring import score_sequences
from sera_plugin.rundir.checksums import newest_checkpoint
from sera_plugin.rundir.store import RunStore
from sera_plugin.sampling.transformers import TransformersSampler
from tests.conftest import adapter, fill, ids


@pytest.mark.slow
def test_a_disk_that_fills_up_at_a_checkpoint_stops_the_run_and_nothing_is_lost(
    base_config, train, small_disk, monkeypatch
):
    save_model = Trainer.save_model

    def filled(self, *args, **kwargs):
        if self.state.global_step == 6:
            fill(small_disk)
        return save_model(self, *args, **kwargs)

    output = small_disk / "out"
    base_config |= adapter(output_dir=str(output), auto_resume_from_checkpoints=True)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_model", filled)
        with pytest.raises(OSError, match=r"takes no more files: No space left.*Free some space"):
            train(base_config)
    (small_disk / "filler").unlink()
    assert newest_checkpoint(output) == 3
    resumed = train(base_config)
    assert resumed.trainer.state.global_step == 9
    assert [entry["step"] for entry in resumed.history if "loss" in entry] == list(range(1, 10))
    assert newest_checkpoint(output) == 9


@pytest.mark.slow
def test_a_read_only_output_directory_is_refused_before_anything_is_loaded(
    base_config, load, small_disk
):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    base_config["output_dir"] = str(small_disk / "not/there/yet")
    with pytest.raises(ValueError, match=r"output_dir: .*not/there/yet' cannot be written"):
        load(base_config)


HOLD = """
import sys, time
import sera_plugin.rundir.store as module
module._HELPERS_END_WITHIN = 0
store = module.RunStore(sys.argv[1])
store.lock()
print("locked", flush=True)
time.sleep(600)
"""


@contextmanager
def another_run(output: Path) -> Iterator[int]:
    """A process that has the directory until it is killed; gives its id."""
    command = [sys.executable, "-c", HOLD, str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        yield other.pid
        other.send_signal(signal.SIGKILL)


def test_a_directory_takes_one_run_at_a_time_and_a_dead_ones_lock_holds_nobody_up(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("sera_plugin.rundir.store._HELPERS_END_WITHIN", 0)
    with (
        another_run(tmp_path) as process,
        pytest.raises(ValueError, match=rf"in use by another run \('process {process} on"),
    ):
        RunStore(tmp_path).lock()
    lock = tmp_path / "sera/lock"
    assert f"process {process}" in lock.read_text()
    for _ in range(2):
        RunStore(tmp_path).lock()
    # Reading it does not give it up: an upload of output_dir reads every file in it.
    assert lock.read_text().startswith(f"process {os.getpid()}")
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    other = subprocess.run(command, capture_output=True, text=True)
    assert "in use by another run" in other.stderr


@pytest.mark.slow
def test_a_second_run_changes_nothing_of_the_first(base_config, train, monkeypatch):
    monkeypatch.setattr("sera_plugin.rundir.store._HELPERS_END_WITHIN", 0)
    output = Path(base_config["output_dir"])
    with another_run(output), pytest.raises(ValueError, match="in use by another run"):
        train(base_config)
    # The host writes debug.log before it asks a plugin, once a process: here or in an earlier test.
    files = {path.name for path in output.rglob("*") if path.is_file()}
    assert files - {"debug.log"} == {"lock"}


@contextmanager
def limited(model, most, allocate=lambda: torch.empty(2**50)):
    """Within it a forward pass fits `most` tokens; gives the sizes of those that are tried."""
    sizes = []

    def check(module, args, kwargs):
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > most:
            allocate()  # the real error of a CPU, unless a GPU's is asked for

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    yield sizes
    handle.remove()


def test_scoring_goes_on_in_smaller_batches_and_remembers(model, caplog):
    prompts, completions = ids(*[4] * 8), ids(*[8] * 8, seed=1)
    expected = score_sequences(model, prompts, completions, pad_id=0, budget=TokenBudget(96))
    budget = TokenBudget(96)
    with limited(model, 24) as sizes:
        scores = score_sequences(model, prompts, completions, pad_id=0, budget=budget)
        # 8 sequences of 12 tokens fail, then 4; pairs fit, and so do all others from then on.
        assert sizes == [96, 48, 24, 24, 24, 24]
        assert abs(scores - expected).max() < 1e-4
        assert "out of memory while scoring 8 sequences of 12 tokens at a time" in caplog.text
        assert (budget.tokens, budget.planned) == (24, 96)
        sizes.clear()
        score_sequences(model, prompts, completions, pad_id=0, budget=budget)
        assert sizes == [24, 24, 24, 24]
    abilities(model)
    with (
        limited(model, 5),
        pytest.raises(ValueError, match=r"with 12 tokens at a time\. Lower sequence_len"),
    ):
        score_sequences(model, ids(4, 4), ids(8, 8), pad_id=0, budget=TokenBudget(99))


def test_sampling_goes_on_in_smaller_batches(model, caplog):
    """Three prompts with four candidates each; a forward pass takes four sequences at most."""

    def gpu_ran_out():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    sampler = TransformersSampler(model, pad_id=0, token_budget=10_000)
    settings = SamplingSettings(4, 1.0, 1.0, 6, 48, (2,), seed=3)
    with limited(model, 4 * 5, gpu_ran_out):
        chunks = list(sampler.sample(ids(5, 5, 5), settings))
    assert [[row for row, _ in chunk] for chunk in chunks] == [[0], [1], [2]]
    assert all(len(candidates) == 4 for chunk in chunks for _, candidates in chunk)
    assert "out of memory while sampling 3 sequences of 44 tokens" in caplog.text


def test_another_error_is_not_taken_for_memory(model):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with limited(model, 0, broken), pytest.raises(RuntimeError, match="illegal memory access"):
        score_sequences(model, ids(4, 4), ids(8, 8), pad_id=0, budget=TokenBudget(99))


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"dpo_loss_type": ["apo_zero"]}], ids=["ours", "host"])
def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(base_config, train, keys):
    base_config |= {"learning_rate": 1e25, "num_epochs": 1} | keys
    said = r"the loss is (nan|inf).* in step \d \(iteration 1\).*lower"
    with pytest.raises(ValueError, match=said):
        train(base_config)
    output = Path(base_config["output_dir"])
    assert not list(output.glob("checkpoint-*"))
    assert (output / "sera/iteration-01/offline.parquet").exists()


@pytest.mark.slow
def test_weights_that_are_no_numbers_are_not_saved(base_config, train):
    # One step of plain descent leaves the range of float32, from a loss that is a number.
    base_config |= {"optimizer": "sgd", "learning_rate": 3e38, "max_grad_norm": 1e9}
    base_config |= {"save_steps": 1, "saves_per_epoch": None, "warmup_steps": 0}
    with pytest.raises(ValueError, match=r"weights are not finite after step \d \(iteration 1\)"):
        train(base_config)
    saved = Path(base_config["output_dir"]).glob("checkpoint-*/*.safetensors")
    assert all(w.isfinite().all() for path in saved for w in load_file(path).values())
