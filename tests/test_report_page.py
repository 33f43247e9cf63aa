"""The page: harmless whatever is in it, of runs in any state, and small."""

import base64
import fcntl
import hashlib
import html
import os
import re
import shutil
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from sera_plugin.rundir.checksums import seal
from sera_plugin.rundir.store import make_table
from sera_plugin.tools.report import page
from sera_plugin.tools.report.page import write_report
from tests.report_run import WORDS, make_run, write_tokenizer

ROOT = Path(__file__).parents[1]
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\" onmouseover='alert(1)' x=\"",
    "</pre></article><style>*{display:none}</style>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;&#x3c;",
    "]]><!--",
    "\u202egnp.exe \u200b\u2066",
    "\x1b[31mred\x1b[0m\x08\x00\x9b\r",
    "مرحبا بالعالم",
    "$\\frac{1}{0}$",
]


class Page(HTMLParser):
    """Tags, attributes and text of a run's page as a browser sees them."""

    def __init__(self, output_dir: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.html = write_report(output_dir).read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def hostile_run(output_dir: Path) -> Path:
    """Everything that has a name or a text there tries to be more than text."""
    make_run(
        output_dir,
        scores={
            "$\\frac{$<b onclick=x>_chosen": np.arange(12.0).tolist(),
            "$\\frac{$<b onclick=x>_rejected": [1.0] * 12,
            HOSTILE[0]: [*HOSTILE, "x"],
        },
        words=["</s>", *HOSTILE, *WORDS[1:]],
        config={"base_model": "</title><script>alert(1)</script>", "optimizer": HOSTILE[0] * 20},
    )
    return output_dir


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def test_the_page_has_a_chart_or_table_for_each_question_and_asks_nobody(tmp_path):
    scores = {"score_chosen": np.arange(12.0).tolist(), "score_rejected": [3.0] * 12}
    make_run(tmp_path, scores=scores)
    found = Page(tmp_path)
    sections = "margins selection lengths scores accuracy samples cost training"
    for section in [*sections.split(), "alarms", "examples", "settings"]:
        assert f'<section id="{section}">' in found.html
    # Margins, lengths and scores of two iterations, the ensemble of one, mean lengths, accuracy,
    # drift, drift among published runs, and three training curves.
    assert found.tags.count("svg") == 2 * 3 + 1 + 4 + 3
    assert "Iteration 3: the ensemble exchanged" in found.text
    assert "The last two selections have a Jaccard index of" in found.text
    # All colours follow light and dark.
    assert "prefers-color-scheme: dark" in found.html
    drawn = "".join(re.findall(r"<svg.*?</svg>", found.html, flags=re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", drawn)
    assert "var(--kept)" in drawn
    # One script, known by its hash, and no address.
    script = (ROOT / "sera_plugin/tools/report/page.js").read_text().removesuffix("\n")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert any(policy in value for name, value in found.attributes if name == "content")
    assert f"<script>{script}</script>" in found.html
    links = [value for name, value in found.attributes if name in ("href", "src", "xlink:href")]
    links += re.findall(r"url\(([^)]*)", found.html)
    assert links
    assert all(value.startswith("#") for value in links)
    addresses = set(re.findall(r"https?://[^\s\"'<]+", found.html))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    # Every alarm can be judged from iteration 3 on, and means what the docs say.
    row = r'<tr><th scope="row">(\w+)</th><td class="figures">.*<td class="text">(.*)</td></tr>'
    meant = {name: html.unescape(text) for name, text in re.findall(row, found.html)}
    rows = re.findall(r"^\| `(\w+)` \|(.*)", (ROOT / "docs/alarms.md").read_text(), re.MULTILINE)
    assert meant == {name: re.split(r"(?<!\\)\|", row)[2].strip() for name, row in rows}


def test_hostile_text_stays_text(tmp_path):
    found = Page(hostile_run(tmp_path / "<img src=x>"))
    assert (found.tags.count("script"), found.tags.count("style")) == (1, 1)
    assert not {"img", "iframe", "object", "link", "b"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    shown = re.sub(r"[\n\t]", "", found.html)
    assert all(one.isprintable() for one in shown), {o for o in shown if not o.isprintable()}
    escaped = (r"\u202egnp.exe \u200b\u2066", r"red\x08\x00\x9b\r")
    assert not [word for word in (*HOSTILE[:7], HOSTILE[9], *escaped) if word not in found.text]


def test_a_run_at_every_moment_of_its_making_has_a_report(tmp_path):
    """Files are taken away in the reverse order of their writing, as if it were cut off there."""
    store = make_run(tmp_path, iterations=2)
    lock = os.open(store.root / "lock", os.O_RDWR | os.O_CREAT)
    written = ("summary.json", "evaluation.parquet", "bootstrapped.parquet", "candidates.parquet")
    for iteration in (2, 1):
        for name in (*written, "offline.parquet"):
            (store.iteration(iteration) / name).unlink(missing_ok=True)
            found = Page(tmp_path)
            assert "SeRA run, stopped" in found.text
            assert "Missing or damaged" not in found.text
        shutil.rmtree(store.iteration(iteration))
    fcntl.flock(lock, fcntl.LOCK_EX)
    found = Page(tmp_path)
    os.close(lock)
    assert "SeRA run, going on" in found.text
    assert "No iteration has begun yet." in found.text


_PARTS = ("offline.parquet", "evaluation.parquet", "candidates.parquet", "bootstrapped.parquet")
_FILES = ["dataset.parquet", *(f"iteration-02/{name}" for name in (*_PARTS, "summary.json"))]


@pytest.mark.parametrize(
    ("name", "how"),
    # Without run.json no run is there.
    [("run.json", "damaged"), *product(_FILES, ("damaged", "missing"))],
)
def test_what_is_not_whole_is_named_and_left_out(tmp_path, name, how):
    path = make_run(tmp_path).root / name
    damage(path) if how == "damaged" else path.unlink()
    found = Page(tmp_path)
    assert f"sera/{name} is {how}" in found.text
    assert "Iteration 3: offline pairs above" in found.text
    assert ('<section id="examples">' in found.html) == (name != "dataset.parquet")


def test_tables_without_rows_or_columns_and_a_checkpoint_that_is_not_whole(tmp_path):
    store = make_run(tmp_path)
    shutil.copytree(tmp_path / "checkpoint-9", tmp_path / "checkpoint-3")
    damage(tmp_path / "checkpoint-9" / "trainer_state.json")
    store.write(3, "bootstrapped", store.read(3, "bootstrapped").slice(0, 0))
    (store.iteration(3) / "offline.parquet").unlink()
    found = Page(tmp_path)
    assert "iteration-03/offline.parquet is missing" in found.text
    assert "checkpoint-9/trainer_state.json is not whole" in found.text
    assert '<section id="training">' in found.html  # of the older one
    store.write(3, "offline", make_table({"row": [0]}))
    found = Page(tmp_path)
    assert "iteration-03/offline.parquet is left out: it has no column chosen_length" in found.text
    assert "Iteration 2: offline pairs above" in found.text


def test_the_tokenizer_is_that_of_the_first_policy_or_ids_are_shown(tmp_path):
    store = make_run(tmp_path, words=None, config={"base_model": str(tmp_path / "nowhere")})
    policy = store.policy(1)
    policy.mkdir()
    write_tokenizer(policy, ["</s>", *(f"policy{n}" for n in range(1, 40))])
    found = Page(tmp_path)  # it is not sealed
    assert "Token ids, not text: no tokenizer.json in the run's policies" in found.text
    assert "5 5 5 0" in found.text
    seal(policy)
    assert "policy5" in Page(tmp_path).text


def test_thousands_of_pairs_are_a_small_page(tmp_path):
    """Nothing of a page grows with the pairs, at the longest texts that it shows."""
    total = 6_000
    words = ["</s>", *("\U0010ffff&\"'<" * 500 + str(n) for n in range(1, 40))]
    scores = {"score_chosen": np.linspace(0, 1, total).tolist(), "score_rejected": [0.5] * total}
    make_run(tmp_path, pairs=total, words=words, scores=scores)
    found = write_report(tmp_path).read_text()
    assert "Best sampled pairs" in found
    assert "more characters]" in found
    # Where a text is cut shows, and the next part of it opens.
    assert re.search(r'…</pre>\s*<details class="more"><summary>[\d,]+ more characters<', found)
    assert len(found.encode()) < 3_000_000


def test_the_first_process_writes_it_at_the_end_of_training(tmp_path, monkeypatch, caplog):
    """`post_train_unload`, which the host calls last of all; a failure is a warning."""
    from axolotl.utils.dict import DictDefault

    from sera_plugin.host.plugin import SeraPlugin

    def end(rank="0"):
        monkeypatch.setenv("RANK", rank)
        SeraPlugin().post_train_unload(DictDefault(output_dir=str(tmp_path), sera={}))
        return (tmp_path / "sera/report.html").exists()

    assert not end()
    assert "no SeRA run there" in caplog.text
    make_run(tmp_path)
    assert not end(rank="1")
    with monkeypatch.context() as patched:
        patched.setattr(page, "render", lambda run: 1 / 0)
        assert not end()
    assert "division by zero" in caplog.text
    assert f"axolotl sera report {tmp_path}" in caplog.text
    assert end()
