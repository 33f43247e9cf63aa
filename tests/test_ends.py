"""How a run begins and ends for who reads the terminal: its first block, its last, its errors."""

import os
import subprocess
import sys

import pytest
import yaml
from axolotl.utils.dict import DictDefault

from sera_plugin.config.sera import SeraConfig
from sera_plugin.host import errors
from sera_plugin.host.ends import describe_beginning, describe_done
from sera_plugin.host.plugin import SeraPlugin
from sera_plugin.rundir import checksums
from sera_plugin.rundir.store import write_json
from tests.conftest import write_rows
from tests.report_run import make_run

COMMAND = (sys.executable, "-m", "axolotl.cli.main", "train", "config.yaml", "--launcher", "python")


def raised(call, *arguments):
    try:
        call(*arguments)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_a_sentence_of_ours_is_told_from_a_fault(tmp_path):
    def anothers():
        raise ValueError("not of this package")

    refused = raised(SeraConfig.parse, {"gamma": 3}, "sera.")
    assert errors.is_said(refused)
    assert errors.is_said(raised(checksums.named_checkpoint, tmp_path, "elsewhere"))
    ours = {
        code: compile(code, errors.__file__, "exec") for code in ("raise OSError(2)", "int('x')")
    }
    assert [errors.is_said(raised(exec, code)) for code in ours.values()] == [True, False]
    assert not errors.is_said(raised(lambda: SeraConfig(gamma=3)))  # pydantic's
    assert not errors.is_said(raised(anothers))
    assert not errors.is_said(ValueError("never raised"))


def test_the_hook_leaves_the_errors_of_others_to_who_had_them(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: given.append(error[1]))
    errors.end_with_sentences()
    hook = sys.excepthook
    errors.end_with_sentences()
    assert sys.excepthook is hook
    refused = raised(SeraConfig.parse, {"gamma": 3}, "sera.")
    fault = raised(int, "x")
    for error in (refused, fault):
        hook(type(error), error, error.__traceback__)
    assert given == [fault]
    said = capsys.readouterr().err
    assert said == f"Error: {refused}\n"
    assert "sera.gamma" in said
    monkeypatch.setenv("SERA_TRACEBACK", "1")
    hook(type(refused), refused, refused.__traceback__)
    assert given == [fault, refused]


def test_train_ends_with_the_sentence_alone(base_config, world, tmp_path):
    """The real command, at a misspelt key and at a row that cannot be used."""
    write_rows(tmp_path / "pairs.jsonl", [*world.rows[:4], {**world.rows[4], "chosen": None}])
    base_config["datasets"][0]["path"] = "pairs.jsonl"
    base_config["sera"]["bad_rows"] = "raise"

    def train(config, **more):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        done = subprocess.run(
            COMMAND, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **more}
        )
        assert done.returncode == 1
        return done

    done = train({**base_config, "sera": {"gama": 0.3}})
    assert done.stderr.endswith("Error: sera.gama is not a key. Did you mean `gamma`?\n")
    assert "Traceback" not in done.stderr
    done = train(base_config, SERA_TRACEBACK="1")
    _, traceback, sentence = done.stderr.partition("Traceback (most recent call last):")
    assert traceback
    assert "field 'chosen' is null, not text" in sentence.splitlines()[-1]
    # What will happen was said before the host's own first words on it.
    first, _, _ = done.stdout.partition("config:\n{")
    assert "SeRA: what this run will do\n" in first
    assert "  pairs: pairs.jsonl; held out: test_datasets\n" in first


@pytest.mark.parametrize(
    ("keys", "block", "said", "unsaid"),
    [
        (
            {"auto_resume_from_checkpoints": True},
            {},
            (
                "  model: org/base, all of its weights",
                "  pairs: a.jsonl, b.jsonl; held out: 5 % of them, if not few (sera.held_out)",
                "  3 iterations, one per epoch; from iteration 2 on each keeps 0.7 of the pairs "
                "(the largest margins) and adds 0.3 times as many pairs of the policy's own "
                "answers",
                "ranked by its implicit reward",
                "newest checkpoint: the same command",
            ),
            "in the YAML",
        ),
        (
            {"adapter": "lora", "val_set_size": 0.1},
            {"bootstrap_ratio": 0},
            ("its lora adapter", "held out: val_set_size: 0.1", "checkpoints: true in the YAML"),
            "answers",
        ),
        (
            {},
            {"selection_ratio": 0, "labeler": "spin", "keep": "last", "sampler": "vllm-server"},
            ("from iteration 1 on", "held out: none", "`vllm serve`", "ranked by the dataset"),
            "5 %",
        ),
    ],
)
def test_the_first_block_says_what_will_happen(keys, block, said, unsaid):
    cfg = {
        "base_model": "org/base",
        "datasets": [{"path": "a.jsonl"}, {"path": "b.jsonl"}],
        "num_epochs": 3,
        "output_dir": "out",
        "axolotl_config_path": "sera.yaml",
    }
    text = describe_beginning(cfg | keys, SeraConfig(**block))
    assert len(text.splitlines()) <= 8
    assert not [one for one in said if one not in text]
    assert unsaid not in text
    assert "axolotl sera plan sera.yaml" in text


def test_the_last_block_says_what_was_done_and_what_is_next(tmp_path):
    store = make_run(tmp_path)
    report = tmp_path / "report.html"
    text = describe_done(tmp_path, "sera.yaml", report)
    # Three iterations of ten seconds in training, and next to nothing else.
    assert text.startswith(
        "SeRA is done: 3 iterations in 0:00:30 (h:mm:ss), 12 pairs, 4 held out\n"
    )
    assert "  iteration 1: 12 of 12 pairs kept\n" in text
    assert "  iteration 3: 6 of 12 pairs kept, 6 sampled\n" in text
    assert "  kept: the policy after iteration 3, the last (sera.keep: last)\n" in text
    accuracies = [store.summary(t)["evaluation"]["accuracy"] for t in (2, 3)]
    shown = "{:.0%} after 1, {:.0%} after 2".format(*accuracies)
    assert f"ranked as labelled, by iteration: {shown}\n" in text
    names = {one["name"] for t in (1, 2, 3) for one in store.summary(t)["alarms"]}
    assert names
    assert all(f"{name} (iteration " in text for name in names)
    assert f"to read: {report}\n" in text
    assert f"axolotl sera eval {tmp_path} --prompts FILE\n" in text
    assert "merge-lora" not in text
    store.end = 4
    ending = {"policies": 3, "kept": 1, "held_out_losses": [0.7, 0.5, None, 0.6]}
    store.write_summary(4, {**ending, "seconds": {"score_evaluation": 30.0}})
    text = describe_done(tmp_path, "sera.yaml", None)
    assert "in 0:01:00" in text
    assert "to read" not in text
    kept = "  kept: the policy after iteration 1: each later one is clearly worse than an earlier "
    assert f"{kept}one\n" in text
    assert ": before 0.7, after 1 0.5, after 3 0.6\n" in text
    assert f"after iteration 3 is in {store.last / 'policy'}\n" in text


def test_the_last_block_of_many_iterations_of_an_adapter_is_short(tmp_path):
    make_run(tmp_path, iterations=30, config={"adapter": "lora"})
    text = describe_done(tmp_path, "sera.yaml", None)
    lines = text.splitlines()
    assert len(lines) < 18
    assert max(map(len, lines)) < 400
    assert f"axolotl merge-lora sera.yaml --lora-model-dir {tmp_path}" in text
    assert f"axolotl sera eval {tmp_path} --iterations --prompts FILE" in text


def test_the_last_block_ends_training_whatever_became_of_the_report(tmp_path, sera_log):
    sera_log.set_level("INFO", "axolotl.sera")
    make_run(tmp_path)
    cfg = DictDefault(output_dir=str(tmp_path), axolotl_config_path="sera.yaml", sera={})
    SeraPlugin().post_train_unload(cfg)
    *_, writing, last = [record.getMessage() for record in sera_log.records]
    assert writing == "SeRA: writing the report"
    assert last == describe_done(tmp_path, "sera.yaml", tmp_path / "sera/report.html")
    (tmp_path / "sera/run.json").write_text("{}")
    SeraPlugin().post_train_unload(cfg)
    assert sera_log.records[-1].getMessage() == writing
    # One that is whole, of the format, and without what the last words need.
    told = {"format_version": 1, "config": {"num_epochs": 3}}
    write_json(tmp_path / "sera/run.json", told)
    SeraPlugin().post_train_unload(cfg)
    assert "the report could not be written" in sera_log.records[-1].getMessage()
