"""What the files of a run directory hold (docs/run-directory.md), checked as they are read.

Everybody who reads a run directory reads it through here and `tables`: its own run, and the tools,
which may be given one that somebody else has made. A checksum says that a file is what was
written; this says that it can be read by its keys and columns, whoever has written it. `Invalid`
says in half a sentence why not. Nothing is read that does not fit into memory, nor through a link
that leads out of the run.
"""

import json
import stat
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sera_plugin.config.kinds import LABELERS, SELECTIONS
from sera_plugin.config.quoting import plain, quoted

FORMAT_VERSION = 1
#: Iterations of a run; `num_epochs` may not be more.
MOST_ITERATIONS = 10_000
#: Bytes of a JSON file. A log of 100,000 steps has a fifth of it.
_LARGEST_JSON = 256 * 2**20


class Invalid(ValueError):
    """A file that is not of the format; the message says why, in half a sentence."""


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**53)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]


class Keys(BaseModel):
    """Further keys are kept: a later version may add some."""

    model_config = ConfigDict(extra="allow")


class _Settings(Keys):
    """The `sera:` block, as far as what is shown of a run depends on it."""

    labeler: Text | Annotated[list[Text], Field(min_length=1)] = "implicit"
    selection: Text = "irm"
    reward: Text | None = None
    reference: Text | None = None
    gamma: Number | None = None
    selection_ratio: Number | None = None
    bootstrap_ratio: Number | None = None
    candidates: Annotated[int, Field(strict=True, ge=1, le=10_000)] | None = None
    length_control: Text | Number | None = None
    score_columns: list[Text] | None = None
    judge: dict[Text, Any] | None = None

    @model_validator(mode="after")
    def _known(self) -> "_Settings":
        several = [self.labeler] if isinstance(self.labeler, str) else self.labeler
        for name, value, kinds in (
            *(("labeler", one, LABELERS) for one in several),
            ("selection", self.selection, SELECTIONS),
        ):
            if value not in kinds:
                raise ValueError(f"{name} {quoted(value)} is none of {', '.join(kinds)}")
        return self


class _Config(Keys):
    base_model: Text | None = None
    num_epochs: Annotated[float, Field(strict=True, ge=0, le=MOST_ITERATIONS)]
    output_dir: Text | None = None
    chat_template_kwargs: dict[Text, Any] | None = None
    sera: _Settings = _Settings()


class _BaseWeights(Keys):
    """What `host.base` says of the base model: its files, each with a checksum, or a commit."""

    files: dict[Text, Count | None]
    sha256: dict[Text, Text] = {}
    revision: Text | None = None

    @model_validator(mode="after")
    def _each(self) -> "_BaseWeights":
        there = {name for name, size in self.files.items() if size is not None}
        if self.revision is None and self.sha256.keys() != there:
            raise ValueError("sha256 is not of the files that there are")
        return self


class RunFile(Keys):
    """run.json."""

    format_version: Annotated[int, Field(strict=True, ge=FORMAT_VERSION, le=FORMAT_VERSION)]
    run_id: Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{32}$")] | None = None
    config: _Config
    local_datasets: list[Text] | None = None
    versions: dict[Text, Text] = {}
    loss: Text | None = None
    beta: Number | None = None
    per_token: Annotated[bool, Field(strict=True)] | None = None
    micro_batch: Count | None = None
    accumulation: Count | None = None
    pairs: Count | None = None
    evaluation_pairs: Count | None = None
    prompts: Count = 0
    labelled_answers: Count = 0
    end_ids: list[Count] = []
    seed: int | None = None
    dataset_fingerprint: Text | None = None
    evaluation_fingerprint: Text | None = None
    base_weights: _BaseWeights | None = None


Quantiles = dict[Text, Number] | None


class _Counts(Keys):
    offline: Count
    kept: Count
    dropped: Count
    bootstrapped_wanted: Count
    bootstrapped_found: Count
    bootstrapped_kept: Count
    trained: Count


class _Samples(Keys):
    prompts: Annotated[int, Field(strict=True, gt=0)]
    sampled: Annotated[int, Field(strict=True, gt=0)]
    unfinished: Count
    duplicates: Count
    ties: Count
    too_few: Count
    unranked: Count = 0


class _Lengths(Keys):
    chosen: Positive
    rejected: Positive
    trained_chosen: Positive
    trained_rejected: Positive
    sampled: Positive | None = None
    bootstrapped_chosen: Positive | None = None
    bootstrapped_rejected: Positive | None = None


class _Sides(Keys):
    chosen: Number
    rejected: Number


class _HeldOut(Keys):
    pairs: Count
    accuracy: Number
    accuracy_error: Number
    margin: Quantiles = None


class _Reward(Keys):
    weights: dict[Text, Number]
    errors: dict[Text, Number] | None = None
    pairs: Count = 0
    accuracy: Number | None = None
    paper_accuracy: Number | None = None
    by_chance: Number | None = None
    followed: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _together(self) -> "_Reward":
        absent = not self.model_fields_set & {"accuracy", "paper_accuracy", "by_chance"}
        if None in (self.accuracy, self.paper_accuracy, self.by_chance) and not absent:
            raise ValueError("accuracy, paper_accuracy and by_chance are not all there")
        if "errors" not in self.model_fields_set:
            return self
        if self.errors is None or self.errors.keys() != self.weights.keys() or absent:
            raise ValueError("errors are not those of the weights")
        return self


class _Labeler(Keys):
    """With several labelers the reward that mixes them."""

    reward: _Reward | None = None


class _Noise(Keys):
    chosen: list[Number]
    rejected: list[Number]
    margin: Number = 0.0
    within: Number = 0.0


class Summary(Keys):
    """summary.json of an iteration."""

    iteration: Annotated[int, Field(strict=True, ge=1, le=MOST_ITERATIONS)]
    pairs: _Counts
    lengths: _Lengths
    drift: _Sides
    seconds: dict[Text, Number] = {}
    forwarded: dict[Text, dict[Text, Count]] = {}
    margins: dict[Text, Quantiles] = {}
    spread: dict[Text, Number | None] = {}
    samples: _Samples | None = None
    evaluation: _HeldOut | None = None
    reward: _Reward | None = None
    outranking: Number | None = None
    noise: _Noise | None = None
    rounding: Number | None = None
    offline_accuracy: Number | None = None
    offline_accuracy_error: Number | None = None
    jaccard_with_previous: Number | None = None
    held_out_loss: Number | None = None
    label_noise: dict[Text, Number | None] | None = None
    step_zero: dict[Text, Any] | None = None
    sampler: dict[Text, Any] | None = None
    labeler: _Labeler | None = None


class Ending(Keys):
    """last/summary.json."""

    policies: Annotated[int, Field(strict=True, ge=0, le=MOST_ITERATIONS)]
    kept: Annotated[int, Field(strict=True, ge=0, le=MOST_ITERATIONS)]
    held_out_losses: list[Number | None]
    seconds: dict[Text, Number] = {}
    forwarded: dict[Text, dict[Text, Count]] = {}

    @model_validator(mode="after")
    def _one_of_them(self) -> "Ending":
        if self.kept > self.policies:
            raise ValueError(f"kept {self.kept} of {self.policies} policies")
        if len(self.held_out_losses) != self.policies + 1:
            raise ValueError("held_out_losses are not of theta_0 and each policy")
        return self


class _Logged(Keys):
    step: Count
    iteration: Annotated[Number | None, Field(alias="sera/iteration")] = None


class TrainerState(Keys):
    """trainer_state.json of the host, as far as curves are drawn from it."""

    log_history: list[_Logged]


class Record(Keys):
    """sera.json of a checkpoint."""

    pairs: Annotated[list[Count], Field(min_length=1, max_length=MOST_ITERATIONS)]


class AdapterConfig(Keys):
    """adapter_config.json of PEFT, as far as it says where an adapter belongs."""

    base_model_name_or_path: Text


class WeightIndex(Keys):
    """An index of a model's weights in several files: which of them has which."""

    weight_map: dict[Text, Text]


class BaseModelFile(Keys):
    """base_model.json, which stands for a policy that is the base model itself."""

    base_model: Text


def read_json(path: Path, kind: type[Keys] = Keys, root: Path | None = None) -> dict[str, Any]:
    """A JSON file as it was written, once it is known to be of that kind.

    Raises:
        Invalid: for anything else, and a file that lies outside the directory `root`.
        OSError: if it cannot be read.
    """
    size = regular_size(path, root)
    if size > _LARGEST_JSON:
        raise Invalid(f"it has {size:,} bytes, more than any such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
        kind.model_validate(content)
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"])) or "its content"
        given = quoted(wrong["input"], 60)
        raise Invalid(f"{plain(place)} is {given}: {plain(wrong['msg'], 120).lower()}") from None
    except (ValueError, RecursionError) as error:  # also of JSON, UTF-8 and endless numbers
        raise Invalid(f"it is not JSON ({plain(str(error), 80)})") from None
    found: dict[str, Any] = content
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def regular_size(path: Path, root: Path | None) -> int:
    """The size of a regular file, which lies in `root`."""
    if root is not None and not path.resolve().is_relative_to(root.resolve()):
        raise Invalid("it is a link that leads out of the run")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise Invalid("it is no regular file")
    return status.st_size
