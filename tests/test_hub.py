"""`axolotl sera push` against a server that speaks the hub's protocol."""

import io
import json
import os
import socket
import subprocess
import sys

import httpx
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard, constants, get_session

from sera_plugin.cli import sera
from sera_plugin.rundir.checksums import replace_directory
from sera_plugin.tools.report.pairs import examples
from sera_plugin.tools.report.reading import Run
from sera_plugin.tools.sharing import hub as sharing_hub
from sera_plugin.tools.sharing.card import model_card
from sera_plugin.tools.sharing.pairs import Pairs
from tests.hub_server import TOKEN, running_hub
from tests.report_run import make_run, write_tokenizer

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
REVISIONS = ("main", "iteration-1", "iteration-2", "iteration-3")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running hub, and a client of this process that knows it and has a token for it."""
    with running_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        address = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def run(tmp_path):
    """A finished LoRA run with all its policies, and beside them what nobody is to get."""
    output = tmp_path / "runs" / "mine"
    config = {"base_model": str(tmp_path / "base"), "adapter": "lora"}
    store = make_run(output, config=config)

    def fill(policy):
        def write(directory):
            directory.mkdir(parents=True, exist_ok=True)
            told = {"base_model_name_or_path": str(tmp_path / "base"), "r": 8}
            (directory / "adapter_config.json").write_text(json.dumps(told))
            (directory / "adapter_model.safetensors").write_bytes(b"weights %d" % policy)
            (directory / "README.md").write_text(f"base_model: {tmp_path}")
            (directory / "optimizer.pt").write_bytes(b"state")
            (directory / "config.json").write_text(json.dumps({"_name_or_path": str(tmp_path)}))
            write_tokenizer(directory, ["</s>", *(f"w{n}" for n in range(1, 40))])

        return write

    for policy in (0, 1, 2):
        replace_directory(store.policy(policy + 1), fill(policy))
    fill(3)(output)
    return output


def push(run, *options, to="user/mine"):
    return CliRunner().invoke(sera, ["push", str(run), "--to", to, *options])


def test_every_policy_is_a_revision_and_nothing_else_leaves(hub, run, tmp_path):
    done = push(run)
    assert done.exit_code == 0, done.output
    for policy, revision in enumerate(REVISIONS):
        files = dict(hub.files("model", "user/mine", revision))
        assert sorted(files.keys() - {".gitattributes"}) == FILES
        assert files["adapter_model.safetensors"] == b"weights %d" % (policy or 3)
        card = ModelCard(files["README.md"].decode())
        assert f"This is theta_{policy or 3}" in card.text
        assert card.data.datasets == ["user/mine-pairs"]
        assert json.loads(files["adapter_config.json"]) == {
            "base_model_name_or_path": "base",
            "r": 8,
        }
        everything = b"".join(files.values())
        assert str(tmp_path).encode() not in everything
        assert TOKEN.encode() not in everything
    pairs = hub.files("dataset", "user/mine-pairs")
    assert sorted(pairs.keys() - {".gitattributes"}) == [
        "README.md",
        "data/iteration-02.parquet",
        "data/iteration-03.parquet",
    ]
    assert all(one.private for one in hub.repositories.values())
    assert TOKEN not in done.output


def test_the_same_command_again_adds_nothing(hub, run):
    assert push(run).exit_code == 0
    commits, uploads = hub.commits(), list(hub.uploaded)
    again = push(run)
    assert again.exit_code == 0
    assert (hub.commits(), hub.uploaded) == (commits, uploads)
    assert again.output.count("is there already") == 5


def test_who_the_token_is_of_is_asked_once(hub, run):
    assert push(run).exit_code == 0
    assert hub.steps.count("GET /api/whoami-v2") == 1


def test_a_server_that_never_answers_ends_the_push(hub, run, monkeypatch):
    client = get_session()
    monkeypatch.setattr(sharing_hub, "_TIMEOUT", httpx.Timeout(0.5))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        done = push(run)
    assert (done.exit_code, f"{url} cannot be reached" in done.output) == (1, True)
    # The client of others is as it was, and has no timeout.
    assert get_session() is not client
    assert get_session().timeout == client.timeout == httpx.Timeout(None)


def test_a_page_in_place_of_an_answer_is_said(hub, run):
    hub.page = b"<html>Log in to this network</html>"
    done = push(run)
    assert (done.exit_code, "answers with no JSON" in done.output) == (1, True)


def test_a_card_whose_metadata_is_broken_is_something_else(hub, run):
    push(run, "--no-pairs")
    hub.files("model", "user/mine")["README.md"] = b"---\na: [\n---\n"
    done = push(run, "--no-pairs")
    assert (done.exit_code, "it holds something else" in done.output) == (2, True)


def test_what_was_broken_off_goes_on(hub, run):
    hub.breaks_after = 2
    done = push(run)
    assert done.exit_code == 1
    assert "Start the same command again" in done.output
    hub.breaks_after = None
    assert push(run).exit_code == 0
    assert len(hub.uploaded) == len(set(hub.uploaded)) == 5  # three adapters, two of pairs
    assert all(hub.files("model", "user/mine", revision) for revision in REVISIONS)


def test_the_license_that_people_gave_it_stays(hub, run):
    push(run)
    files = hub.files("model", "user/mine")
    changed = {
        **files,
        "README.md": files["README.md"].replace(b"---\n", b"---\nlicense: mit\n", 1),
    }
    hub.repositories["model", "user/mine"].commit("main", changed)
    commits = hub.commits()
    assert push(run).exit_code == 0
    assert ModelCard(hub.files("model", "user/mine")["README.md"].decode()).data.license == "mit"
    # On the other revisions too, and then that is all.
    assert hub.commits() == commits + 4
    push(run)
    assert hub.commits() == commits + 4


def test_weights_in_other_parts_replace_those_before(hub, run):
    push(run)
    files = hub.files("model", "user/mine")
    stale = {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine"}
    hub.repositories["model", "user/mine"].commit("main", {**files, **stale})
    push(run)
    assert hub.files("model", "user/mine").keys() - files.keys() == {"notes.txt"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda hub, env: env.delenv("HF_TOKEN"), "there is no token"),
        (lambda hub, env: env.setenv("HF_TOKEN", "hf_another"), "does not know the token"),
        (lambda hub, env: setattr(hub, "role", "read"), "the token may only read"),
        (lambda hub, env: setattr(hub, "user", "somebody"), "may write to somebody/..., an-org/"),
        (
            lambda hub, env: env.setattr(constants, "HF_HUB_OFFLINE", True),
            "HF_HUB_OFFLINE is set",
        ),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_anything_is_made(
    hub, run, monkeypatch, change, said
):
    change(hub, monkeypatch)
    done = push(run)
    assert done.exit_code == 2
    assert said in done.output
    assert not hub.repositories


def test_a_name_that_is_taken_is_refused_before_anything_is_made(hub, run, tmp_path):
    push(run, "--no-pairs", to="user/other")
    hub.repositories["dataset", "user/mine-pairs"] = hub.repositories["model", "user/other"]
    hub.files("dataset", "user/mine-pairs")["README.md"] = b"mine"
    done = push(run)
    assert (done.exit_code, "user/mine-pairs is taken" in done.output) == (2, True)
    assert ("model", "user/mine") not in hub.repositories
    make_run(tmp_path / "second", pairs=14)
    hub.files("dataset", "user/mine-pairs").clear()
    push(run)
    (tmp_path / "second/adapter_model.safetensors").write_bytes(b"x")
    done = push(tmp_path / "second")
    assert (done.exit_code, "it holds another SeRA run" in done.output) == (2, True)


def test_no_permission_to_write_is_said(hub, run):
    hub.forbidden = r"/commit/"
    done = push(run)
    assert done.exit_code == 1
    assert "The token may not write there" in done.output


def test_public_is_asked_for_and_what_is_there_keeps_its_visibility(hub, run):
    push(run, "--no-pairs", "--public", to="an-org/mine")
    assert not hub.repositories["model", "an-org/mine"].private
    done = push(run, "--no-pairs", to="an-org/mine")
    assert "is public already and stays so" in done.output
    assert len(hub.repositories) == 1


def test_a_dry_run_says_it_all_and_asks_nobody(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    done = push(run, "--dry-run", "--pairs-to", "user/pairs")
    assert done.exit_code == 0, done.output
    assert "model user/mine @ iteration-2: theta_2, 4 files" in done.output
    assert "dataset user/pairs @ main: pairs of 2 iterations, as text, 3 files" in done.output
    assert not hub.steps


@pytest.mark.parametrize(
    "name", ["mine", "a/b/c", "user/", "us er/x", "user/a..b", "user/x.git", "usér/x"]
)
def test_a_name_that_is_none_is_refused(run, name):
    done = push(run, "--dry-run", to=name)
    assert (done.exit_code, "write user/name" in done.output) == (2, True)


def test_an_unfinished_run_pushes_its_newest_policy(run):
    summary = json.loads((run / "sera/iteration-03/summary.json").read_text())
    del summary["seconds"]["train"]
    from sera_plugin.rundir.store import RunStore

    RunStore(run).write_summary(3, summary)
    done = push(run, "--dry-run")
    assert "@ main: theta_2" in done.output
    assert "the run has not finished: its newest policy, theta_2, is pushed" in done.output
    assert "iteration-3" not in done.output


def test_policies_that_are_gone_and_pairs_that_were_not_made_are_named(tmp_path, run):
    (run / "sera/iteration-02/policy/adapter_model.safetensors").write_bytes(b"damaged")
    done = push(run, "--dry-run")
    assert "no revision for theta_1: no longer on disk" in done.output
    once = make_run(tmp_path / "once", iterations=1).root.parent
    (once / "model.safetensors").write_bytes(b"x")
    done = push(once, "--dry-run")
    assert "no pairs are pushed: the run has ranked no pairs" in done.output
    (once / "model.safetensors").unlink()
    assert "theta_1 is not whole on disk" in push(once, "--dry-run").output


def test_pairs_of_prompts_without_answers_are_pushed_unless_their_texts_are_missing(tmp_path):
    """4 pairs of w1 to w4, and prompts of w5 to w12."""
    store = make_run(tmp_path, pairs=4, prompts=8)
    pairs = Pairs(Run(store), "user/x")
    rows = pq.read_table(io.BytesIO(pairs.files()["data/iteration-02.parquet"])).to_pylist()
    offline, sampled = (
        [row for row in rows if row["source"] == source] for source in ("offline", "sampled")
    )
    assert [row["prompt"] for row in offline] == [f"w{n} w{n}" for n in range(1, 5)]
    assert sorted(row["row"] for row in sampled) == [*range(12)]
    assert all(row["prompt"] == "w{0} w{0}".format(row["row"] + 1) for row in sampled)
    store.prompts_file.unlink()
    (tmp_path / "model.safetensors").write_bytes(b"x")
    done = push(tmp_path, "--dry-run")
    assert "no pairs are pushed: the texts of sera.prompts are missing" in done.output
    assert "model user/mine @ main" in done.output
    # What is shown are the pairs whose texts are there.
    shown = [one for group in examples(Run(store)) for one in group["pairs"]]
    assert {one["row"] for one in shown} == {0, 1, 2, 3}
    assert "Pairs that it made" in model_card(Run(store)).text


READ = """
from datasets import load_dataset
from huggingface_hub import ModelCard, snapshot_download
import json, os, pandas

card = ModelCard.load("user/mine")
assert card.data.library_name == "peft"
place = snapshot_download("user/mine", revision="iteration-1")
assert open(place + "/adapter_model.safetensors", "rb").read() == b"weights 1"
pairs = load_dataset("user/mine-pairs", split="train")
assert set(pairs.unique("source")) == {"offline", "sampled"}
run, found = os.environ["RUN"] + "/sera/", pairs.to_pandas()
second = found[found.iteration == 2]
offline = pandas.read_parquet(run + "iteration-02/offline.parquet")
ours = second[second.source == "offline"]
assert (ours.margin.values == offline.margin.values).all()
assert (ours.selected.values == offline.selected.values).all()
newest = pandas.read_parquet(run + "iteration-03/offline.parquet")
assert (ours.label_in_doubt.values == (newest.margin < 0).values).all()
made = pandas.read_parquet(run + "iteration-02/bootstrapped.parquet")
sampled = second[second.source == "sampled"]
assert (sampled.margin.values == made.margin.values).all()
assert abs(sampled.chosen_reward - sampled.rejected_reward - sampled.margin).max() < 1e-12
assert sampled.label_in_doubt.isna().all()
first = ours.iloc[0]
assert (first.prompt, first.chosen, first.rejected) == ("w1 w1", "w1 w1 w1", "w1")
best = made.iloc[0]
answer = "w%d" % (1 + best.chosen_candidate)
assert sampled.iloc[0].chosen == " ".join([answer] * (1 + int(best.chosen_candidate)))
print("read back")
"""


def test_what_is_pushed_is_read_back_without_code(hub, run, tmp_path):
    """In a process of its own: the libraries read their addresses when they are imported."""
    assert push(run).exit_code == 0
    environment = {
        **os.environ,
        **{"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN},
        **{"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "RUN": str(run)},
    }
    done = subprocess.run(
        [sys.executable, "-c", READ], env=environment, capture_output=True, text=True, timeout=300
    )
    assert "read back" in done.stdout, done.stderr
