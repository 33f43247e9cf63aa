"""Tables of samples in the trackers that the host logs to, and what a run leaves at its end."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from axolotl.utils.dict import DictDefault
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.integrations import integration_utils

from sera_plugin.algorithm.pairs import Pairs
from sera_plugin.host import trackers
from sera_plugin.host.trackers import HEAD, ROWS, SampleTables, sampled_pairs
from sera_plugin.host.trainer import SeraTrainer
from sera_plugin.rundir.store import RunStore
from tests.conftest import adapter, train_config
from tests.hub_server import TOKEN
from tests.report_run import WORDS, make_run
from tests.test_hub import hub  # noqa: F401

HOSTILE = ["</s>", "<b>|", *(f"w{number}" for number in range(2, 40))]


def trainer_of(output_dir, *callbacks, pairs=60, words=WORDS, prompts=0):
    """What of a trainer is asked for samples, with a run of `pairs` pairs."""
    store = make_run(output_dir, pairs=pairs, words=words, prompts=prompts)
    inner = Tokenizer.from_file(str(output_dir / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    return SimpleNamespace(
        store=RunStore(output_dir),
        loop=SimpleNamespace(
            pairs=Pairs.from_table(pq.read_table(store.dataset_file)),
            more_prompts=pq.read_table(store.prompts_file) if prompts else None,
        ),
        processing_class=tokenizer,
        callback_handler=SimpleNamespace(callbacks=list(callbacks)),
        state=SimpleNamespace(global_step=7),
    )


def test_a_table_goes_from_the_largest_margin_to_the_smallest(tmp_path):
    trainer = trainer_of(tmp_path)
    pairs = sampled_pairs(trainer, 2)
    made = trainer.store.read(2, "bootstrapped").to_pandas().sort_values("margin", ascending=False)
    assert len(made) == 60
    assert len(pairs) == ROWS == 24
    assert pairs[0].margin == made.margin.max()
    assert pairs[-1].margin == made.margin.min()
    assert [p.margin for p in pairs] == sorted((p.margin for p in pairs), reverse=True)
    first = made.iloc[0]
    word = f"w{1 + first.row % 30}"
    best, worst = (int(first[f"{side}_candidate"]) for side in ("chosen", "rejected"))
    assert pairs[0].prompt == f"{word} {word}"
    assert pairs[0].best == " ".join([f"w{1 + best}"] * (1 + best))
    assert pairs[0].worst == " ".join([f"w{1 + worst}"] * (1 + worst))
    assert [p.kept for p in pairs] == sorted((p.kept for p in pairs), reverse=True)


def test_samples_of_prompts_without_answers_are_in_the_table(tmp_path):
    """Their rows go on from those of the pairs: 4 pairs of w1 to w4, and prompts of w5 to w12."""
    trainer = trainer_of(tmp_path, pairs=4, prompts=8)
    made = trainer.store.read(2, "bootstrapped").to_pandas()
    assert sorted(made.row) == [*range(12)]
    order = made.sort_values("margin", ascending=False, kind="stable").row
    expected = [f"w{row + 1} w{row + 1}" for row in order]
    assert [pair.prompt for pair in sampled_pairs(trainer, 2)] == expected


class MLflowCallback:  # named as the host's
    class _ml_flow:
        @staticmethod
        def active_run():
            raise OSError("no connection")


def test_a_tracker_that_fails_is_said_once_and_stops_nobody(tmp_path, sera_log):
    tables = SampleTables(trainer_of(tmp_path, MLflowCallback()))
    tables.log(2)
    tables.log(3)
    (said,) = sera_log.messages
    assert "MLflowCallback has not taken" in said
    assert "no connection" in said


def test_samples_that_cannot_be_read_are_said_once_and_stop_nobody(tmp_path, sera_log):
    trainer = trainer_of(tmp_path, MLflowCallback())
    trainer.processing_class.chat_template = "{{ raise_exception('no such role') }}"
    tables = SampleTables(trainer)
    tables.log(2)
    tables.log(3)
    (said,) = sera_log.messages
    assert "the table of samples could not be made (TemplateError: no such role)" in said
    assert "no more of them are sent to MLflowCallback" in said


def test_nothing_is_read_where_nobody_is_told():
    """No store, no data: the host logs to nothing, or to what has no tables."""
    handler = SimpleNamespace(callbacks=[object()])
    SampleTables(SimpleNamespace(callback_handler=handler)).log(2)


def test_trackio_whose_cells_are_markdown_gets_text_that_is_none(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    told = []
    run = SimpleNamespace(log=lambda metrics, step=None: told.append(metrics))
    token = trackio.context_vars.current_run.set(run)
    callback = type("TrackioCallback", (), {"_trackio": trackio})()
    trainer = trainer_of(tmp_path / "run", callback, pairs=12, words=HOSTILE)
    SampleTables(trainer).log(2)
    trackio.context_vars.current_run.reset(token)
    SampleTables(trainer).log(2)  # no run is open, and none is opened
    (metrics,) = told
    rows = metrics["sera/samples/iteration_2"].data
    rows = rows.to_dict("records") if hasattr(rows, "to_dict") else rows
    assert len(rows) == 12
    assert list(rows[0]) == HEAD
    assert not any("<b>" in str(value) for row in rows for value in row.values())


def test_mlflow_takes_a_table(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    callback = type("MLflowCallback", (), {"_ml_flow": mlflow})()
    tables = SampleTables(trainer_of(tmp_path / "run", callback, pairs=12))
    tables.log(3)
    assert mlflow.active_run() is None
    mlflow.create_experiment("e", artifact_location=str(tmp_path / "artifacts"))
    with mlflow.start_run(experiment_id=mlflow.get_experiment_by_name("e").experiment_id):
        tables.log(2)
    (file,) = (tmp_path / "artifacts").rglob("iteration_2.json")
    found = json.loads(file.read_text())
    assert found["columns"] == HEAD
    assert len(found["data"]) == 12


def test_swanlab_takes_a_table(tmp_path, monkeypatch):
    swanlab = pytest.importorskip("swanlab")
    told = []
    run = SimpleNamespace(get_run=lambda: 1, echarts=swanlab.echarts)
    run.log = lambda metrics, step: told.append((metrics, step))
    callback = type("CustomSwanLabCallback", (), {"swanlab": run})()
    SampleTables(trainer_of(tmp_path, callback, pairs=12)).log(2)
    ((metrics, step),) = told
    options = json.loads(metrics["sera/samples/iteration_2"].dump_options())
    assert step == 7
    assert len(options["rowData"]) == 12
    assert [one["field"] for one in options["colDefs"]] == HEAD


@pytest.mark.slow
def test_what_a_whole_run_leaves(base_config, tmp_path, monkeypatch, sera_log, hub):  # noqa: F811
    """One training: its card, its tables, its figures on boards, and all of it pushed."""
    for name in ("WANDB_DISABLED", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("WANDB_DISABLED")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    base_config |= adapter(use_tensorboard=True, use_wandb=True, num_epochs=2)
    base_config |= {"wandb_mode": "offline", "wandb_project": "p", "save_steps": 2}
    del base_config["saves_per_epoch"]
    base_config["sera"] |= {"push_to_hub": "user/mine"}
    import wandb

    cards = []
    write = SeraTrainer.create_model_card

    def see(self, *args, **kwargs):
        step, path = self.state.global_step, Path(self.args.output_dir, "README.md")
        with monkeypatch.context() as once:  # as where checkpoints are pushed
            once.setattr(self.args, "push_to_hub", step == 4)
            write(self, *args, **kwargs)
        cards.append((step, path.read_text() if path.exists() else "none"))

    monkeypatch.setattr(SeraTrainer, "create_model_card", see)
    sera_log.set_level("INFO", "axolotl.sera")
    result = train_config(base_config, tmp_path)
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().post_train_unload(result.cfg)
    wandb.finish()
    said = "\n".join(sera_log.messages)

    # At three checkpoints and at the last one, where it is as it was, and after training.
    done = [(step, re.findall(r"none|(\d) of 2 iterations are done", card)) for step, card in cards]
    assert done == [(2, [""]), (3, [""]), (4, ["1"]), (6, ["1"]), (6, [])]
    card = ModelCard.load(result.output / "README.md")
    assert "This is theta_2, the policy after iteration 2 of 2" in card.text
    assert "`sera.keep: last`" in card.text
    assert str(tmp_path) not in str(card)
    assert "dataset user/mine-pairs @ main: pairs of 1 iteration, conversations uploaded" in said
    assert TOKEN not in said

    (events,) = (result.output / "runs").glob("*/events*")
    board = EventAccumulator(str(events.parent), size_guidance={"tensors": 0}).Reload()
    scalars = board.Tags()["scalars"]
    groups = {name.split("/")[0] for name in scalars}
    assert groups == {"sera", "train", "eval"}
    assert {"sera/held_out/accuracy", "sera/offline/accuracy", "train/loss"} <= {*scalars}
    key = "sera/samples/iteration_2/text_summary"
    (shown,) = board.Tensors(key)
    lines = shown.tensor_proto.string_val[0].decode().splitlines()
    made = result.run / "iteration-02/bootstrapped.parquet"
    total = min(ROWS, RunStore(result.output).read(2, "bootstrapped").num_rows)
    assert made.exists()
    assert len(lines) == 2 + total
    assert lines[0] == f"| {' | '.join(HEAD)} |"
    (file,) = tmp_path.glob("wandb/offline-run-*/files/media/table/sera/samples/*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == HEAD
    assert len(table["data"]) == total

    main = hub.files("model", "user/mine")
    assert main["adapter_model.safetensors"] == (
        (result.output / "adapter_model.safetensors").read_bytes()
    )
    first = result.run / "iteration-02/policy/adapter_model.safetensors"
    revision = hub.files("model", "user/mine", "iteration-1")
    assert revision["adapter_model.safetensors"] == first.read_bytes()
    assert "data/iteration-02.parquet" in hub.files("dataset", "user/mine-pairs")

    # A hub that fails does not fail the run.
    hub.forbidden = "create"
    hub.repositories.clear()
    PluginManager.get_instance().post_train_unload(result.cfg)
    again = f"to try again: axolotl sera push {result.output} --to user/mine"
    assert again in sera_log.messages[-2]  # before the last words


def test_a_run_that_could_not_push_does_not_begin(base_config, load):
    from axolotl.integrations.base import PluginManager

    base_config["sera"] |= {"push_to_hub": "user/mine"}
    cfg = load(base_config)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        PluginManager.get_instance().load_datasets(cfg, preprocess=False)


def test_a_figure_of_ours_keeps_its_name():
    from sera_plugin.host.patches import prepare_host

    prepare_host(DictDefault({}))
    logs = {"loss": 1.0, "eval_loss": 2.0, "sera/kept": 1.0}
    assert integration_utils.rewrite_logs(logs) == {
        **{"train/loss": 1.0, "eval/loss": 2.0, "sera/kept": 1.0}
    }
    assert set(trackers._TRACKERS) <= {*dir(integration_utils), "CustomSwanLabCallback"}
