"""Sampling but for the child process: which sampler a run takes and why, what of a server's answers
is stored, and room for an engine (nothing moves on a CPU)."""

import math
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig

from sera_plugin.algorithm.method import SamplingSettings
from sera_plugin.config.sera import SeraConfig
from sera_plugin.model.budget import TokenBudget
from sera_plugin.rundir.checksums import replace_directory
from sera_plugin.rundir.ranks import Ranks
from sera_plugin.rundir.store import RunStore
from sera_plugin.sampling import client, offload, samplers, servers
from sera_plugin.sampling.child import SamplingFailed, find_vllm
from sera_plugin.sampling.offload import engine_needs, make_room, resident_tensors
from sera_plugin.sampling.samplers import Choice, Samplers, choose_sampler
from sera_plugin.sampling.vllm import Memory, adapter_problem
from sera_plugin.tools.demo.base_model import build_tokenizer
from tests.servers import vllm_server

MODEL = SimpleNamespace(
    get_input_embeddings=lambda: SimpleNamespace(weight=np.zeros((16, 2), dtype=np.float32))
)
SETTINGS = SamplingSettings(2, 0.7, 0.95, 8, 16, (9, 7), seed=5)
GIB = 2**30
PLAIN = {"peft_type": "PeftType.LORA", "r": 16, "bias": "none"}


@pytest.fixture
def with_vllm(monkeypatch):
    monkeypatch.setattr(samplers, "find_vllm", lambda python: "0.30.0")


def test_what_is_wrong_with_an_interpreter_is_said():
    for python, said in (
        (sys.executable, "vLLM is not installed in"),
        ("/no-such-python", "no-such-python does not run"),
        ("/bin/false", "cannot be imported by .*false: it says no version"),
    ):
        with pytest.raises(RuntimeError, match=said):
            find_vllm(python)


def test_vllm_is_taken_where_it_is_and_without_it_transformers_or_an_error_says_why(monkeypatch):
    assert choose_sampler("transformers", "/no-such-python", None).name == "transformers"
    choice = choose_sampler("auto", sys.executable, None)
    assert choice.name == "transformers"
    assert "vLLM is not installed" in choice.reason
    with pytest.raises(ValueError, match=r"sera\.sampler: vllm, but.*Set sera\.vllm_python"):
        choose_sampler("vllm", sys.executable, None)
    monkeypatch.setattr(samplers, "find_vllm", lambda python: "0.30.0")
    choice = choose_sampler("auto", "python", None)
    assert choice == Choice("vllm", "0.30.0, found in python; starts for each sampling phase")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "adapter with peft_use_dora: True is more than that"),
        ({"modules_to_save": ["lm_head"]}, "lora_modules_to_save: ['lm_head']"),
        ({"rank_pattern": {"q_proj": 4}}, "lora_rank_pattern: {'q_proj': 4}"),
        ({"alpha_pattern": {"q_proj": 4}}, "lora_alpha_pattern"),
        ({"bias": "all"}, "bias: 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "peft_init_lora_weights: 'pissa_niter_4'"),
        ({"init_lora_weights": "loftq"}, "peft_init_lora_weights: 'loftq'"),
        ({"layer_replication": [[0, 2]]}, "peft_layer_replication: [[0, 2]]"),
        ({"trainable_token_indices": {"embed": [5]}}, "_trainable_token_indices: {'embed': [5]}"),
        ({"of_a_later_peft": {"my_token": [5]}}, "of_a_later_peft: {'my_token': ***"),
        ({"target_parameters": ["experts.down_proj"]}, "lora_target_parameters"),
        ({"lora_bias": True}, "lora_bias: True"),
        ({"of_a_later_peft": 3}, "of_a_later_peft: 3"),
        ({"r": 1024}, "ranks from 1 up to 512, not 1024"),
        *(({"r": rank}, f"not {rank!r}") for rank in (None, "8", 0, -4, math.nan, True)),
        ({"peft_type": "PeftType.ADAPTION_PROMPT"}, "not PeftType.ADAPTION_PROMPT"),
    ],
)
@pytest.mark.parametrize("asked", ["auto", "vllm", "vllm-server"])
def test_what_vllm_does_not_serve_falls_back_and_says_so(
    with_vllm, tmp_path, monkeypatch, caplog, change, words, asked
):
    assert adapter_problem(PLAIN) is None
    problem = adapter_problem(PLAIN | change)
    monkeypatch.setattr(Samplers, "_unserved", lambda self: problem)
    choice = chosen({}, 38, tmp_path, sampler=asked).choice
    assert choice.name == "transformers"
    assert words in choice.reason
    assert (f"sera.sampler: {asked} is not used" in caplog.text) == (asked != "auto")


@pytest.mark.parametrize(
    "keys",
    [
        *({}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"lora_dropout": 0.1}),
        *({"layers_to_transform": [0]}, {"target_modules": "all-linear"}, {"lora_alpha": 3}),
    ],
)
def test_what_shapes_the_product_alone_is_served(keys):
    assert adapter_problem(LoraConfig(r=8, task_type="CAUSAL_LM", **keys).to_dict()) is None


def test_a_fully_fine_tuned_policy_is_served_as_its_own_weights_or_as_the_base_model(tmp_path):
    """theta_0 is a pointer in the run directory, which no engine loads."""
    samplers = made(
        {"base_model": "org/base", "torch_dtype": "torch.bfloat16", "revision_of_model": "v2"},
        tmp_path,
        **{"selection_ratio": 0, "bootstrap_ratio": 1, "labeler": "spin", "candidates": 1},
    )
    samplers.choice = Choice("vllm", "it is asked for")
    for t, expected in ((1, ("org/base", {"revision": "v2"})), (2, None)):
        policy = samplers.store.policy(t)
        replace_directory(policy, lambda path: (path / "a.json").write_text("{}"))
        served = samplers.make(t, None, None, 0.01).policy
        assert served.adapter is None
        assert (served.model, served.options) == (expected or (str(policy), {}))


@pytest.mark.parametrize("revision", [None, "v2"])
def test_an_adapter_on_a_vocabulary_that_was_resized_is_not_served(tmp_path, revision):
    """vLLM loads the base model as it is on the disk, or on the hub at that revision."""
    asked = []

    class Config:
        vocab_size = 16

        @classmethod
        def from_pretrained(cls, name, revision):
            asked.append((name, revision))
            return SimpleNamespace(get_text_config=cls)

    lora = SimpleNamespace(to_dict=lambda: PLAIN)
    samplers = made({"base_model": "org/name", "revision_of_model": revision}, tmp_path)
    samplers.scorer.policies.is_adapter = True
    for tokens, said in ((16, "None"), (17, "vocabulary was resized")):
        embeddings = SimpleNamespace(weight=np.zeros((tokens, 2)))
        samplers.scorer.policies.model = SimpleNamespace(
            config=Config(), get_input_embeddings=lambda found=embeddings: found,
            peft_config={"default": lora}, active_adapter="default",
        )  # fmt: skip
        assert said in str(samplers._unserved())
    assert asked == [("org/name", revision or "main")] * 2


def made(cfg: dict, tmp_path, **block) -> Samplers:
    policies = SimpleNamespace(model=MODEL, is_adapter=False)
    scorer = SimpleNamespace(policies=policies, budget=TokenBudget(9))
    tokenizer = SimpleNamespace(all_special_tokens=[])
    cfg = {"sequence_len": 64, **cfg}
    return Samplers(cfg, SeraConfig(**block), RunStore(tmp_path), scorer, tokenizer)


def chosen(cfg: dict, longest: int, tmp_path, **block) -> Samplers:
    samplers = made(cfg, tmp_path, **block)
    assert samplers.choose(longest) == samplers.choice
    return samplers


def test_a_prompt_that_fills_the_engines_context_is_told_before_training(with_vllm, tmp_path):
    cfg = {"vllm": {"max_model_len": 40}}
    assert chosen(cfg, 39, tmp_path).choice.name == "vllm"
    with pytest.raises(ValueError, match=r"vllm\.max_model_len: 40 .* longest prompt.* 40 tokens"):
        chosen(cfg, 40, tmp_path)
    assert chosen({}, 63, tmp_path).choice.name == "vllm"
    assert chosen(cfg, 40, tmp_path, sampler="transformers").choice.name == "transformers"


@pytest.mark.parametrize(("sequence_len", "asked"), [(64, 50), (48, 48), (None, 50)])
def test_a_servers_context_is_compared_before_training(tmp_path, monkeypatch, sequence_len, asked):
    compared = []

    def check(self, longest):
        compared.append(longest)
        return 56

    monkeypatch.setattr(servers.VllmServerSampler, "check", check)
    cfg = {"sequence_len": sequence_len, "base_model": "m", "vllm": {"host": "0.0.0.0"}}
    samplers = chosen(cfg, 38, tmp_path, sampler="vllm-server", max_new_tokens=12)
    assert samplers.choice.name == "vllm-server"
    assert compared == [asked]
    # What is longer than prompt and candidate, such as a judge's prompt, is measured by it.
    sampler = samplers.make(2, None, None, 0.01)
    assert (sampler.longest, sampler.urls) == (56, ("http://127.0.0.1:8000",))


def server_at(*urls: str, base: object = "base", tokenizer=None) -> servers.VllmServerSampler:
    tokenizer = tokenizer or build_tokenizer()
    return servers.VllmServerSampler(urls, "THE KEY", str(base), Path("adapter"), tokenizer, 99)


def test_a_servers_context_is_read_and_a_lost_connection_tried_again(world, monkeypatch):
    monkeypatch.setattr(client, "BACKOFF", 0.01)
    with vllm_server(world.base, drops=3) as server:
        sampler = server_at(server.url, base=world.base)
        assert sampler.check() == sampler.check(48) == 48
        with pytest.raises(SamplingFailed, match=r"context of 48 tokens.*--max-model-len 49"):
            sampler.check(49)


def test_vllm_python_is_checked_when_the_yaml_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"'/no/such/python' is not a program"):
        SeraConfig(vllm_python="/no/such/python")
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    # A virtual environment is known by its link: it must not be followed.
    assert SeraConfig(vllm_python=str(link)).vllm_python == str(link)


def test_a_server_that_is_not_there_is_said_so(monkeypatch):
    monkeypatch.setattr(servers, "RETRIES", 2)
    monkeypatch.setattr(client, "BACKOFF", 0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = rf"127\.0\.0\.1:{port} does not answer /v1/models after 3 tries"
    with pytest.raises(SamplingFailed, match=said):
        next(
            server_at(f"http://127.0.0.1:{port}").sample([np.array([1], dtype=np.int32)], SETTINGS)
        )


@pytest.mark.parametrize("content", [b"<html>It works</html>", b"[]", b'{"object": "list"}'])
def test_a_server_of_another_kind_is_said_so(content):
    with vllm_server(raw=content) as other, pytest.raises(SamplingFailed) as failure:
        server_at(other.url).check()
    said = str(failure.value)
    assert f"{other.port} answers /v1/models as no vLLM does: {content.decode()}." in said
    assert "Set THE KEY to where" in said


def test_what_an_engine_needs_by_hand(model):
    text = model.config
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2
    assert engine_needs(model, 48, 2) == (2 * model.num_parameters(), 32 * 48 * per_token)


@pytest.mark.parametrize(
    ("available", "ranks", "cache", "fits"),
    [(64 * GIB, 1, 16, True), (64 * GIB, 4, 4, True), (6 * GIB, 2, 1, False)],
)
def test_on_a_cpu_ranks_share_the_hosts_memory(model, monkeypatch, available, ranks, cache, fits):
    found = type("Found", (), {"available": available})
    monkeypatch.setattr(offload.psutil, "virtual_memory", lambda: found)
    monkeypatch.setattr(offload, "engine_needs", lambda *_: (2 * GIB, 2 * GIB))
    with make_room(model, model.device, None, 2, {}, Ranks(0, (ranks,)), 48) as memory:
        assert memory == Memory(None, fits, cache_gib=cache)


def test_everything_that_lies_on_the_device_is_found_once_but_what_moves_by_itself(model):
    optimizer = torch.optim.AdamW(model.parameters())
    first = next(model.parameters())
    model(input_ids=torch.tensor([[1, 5, 7]])).logits.sum().backward()
    optimizer.step()
    wanted = [first, first.grad, *optimizer.state[first].values(), *model.buffers()]
    paged = optimizer.state[first]["paged"] = torch.zeros(2)
    paged.is_paged = True
    found = {id(tensor) for tensor in resident_tensors(model, optimizer)}
    assert len(found) == len(resident_tensors(model, optimizer))
    assert found.issuperset(map(id, wanted))
    assert id(paged) not in found


def test_scales_of_four_bit_weights_are_found():
    layer = Linear4bit(64, 64, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict(torch.nn.Linear(64, 64).state_dict())
    layer = layer.to("cpu")
    state = layer.weight.quant_state
    assert isinstance(state, QuantState)
    found = {id(tensor) for tensor in resident_tensors(layer, None)}
    for tensor in (layer.weight, state.absmax, state.code, state.state2.absmax, state.state2.code):
        assert id(tensor) in found


@pytest.mark.parametrize("passed", [False, True])
def test_eight_bit_weights_move_with_their_scales_and_stay_one(passed):
    """bitsandbytes keeps both with the parameter until a layer's first pass, and then in a state
    of the layer, whose weight is the parameter's under another name."""

    def made() -> Linear8bitLt:
        layer = Linear8bitLt(64, 32, has_fp16_weights=False)
        torch.manual_seed(0)
        layer.load_state_dict(torch.nn.Linear(64, 32).state_dict())
        return layer.to("cpu")

    inputs, layer = torch.ones(2, 64, dtype=torch.bfloat16), made()
    expected = made()(inputs)
    if passed:
        layer(inputs)
    holder = layer.state if passed else layer.weight
    tensors = resident_tensors(layer, None)
    assert {*map(id, tensors)} == {*map(id, (layer.weight, layer.bias, holder.CB, holder.SCB))}
    before, away = [each.clone() for each in tensors], offload.Away()
    away.put(tensors)
    assert not any(each.untyped_storage().nbytes() for each in (*tensors, holder.CB))
    away.back()
    assert layer.weight.data_ptr() == holder.CB.data_ptr()
    assert all(map(torch.equal, tensors, before))
    assert torch.equal(layer(inputs), expected)


@pytest.mark.parametrize("interrupted", [False, True])
def test_tensors_that_overlap_come_back_as_they_lie(interrupted):
    """A transposed view, and a part of one storage; on Ctrl-C they stay where their copy is."""
    whole = torch.arange(12.0).view(3, 4)
    tensors = [torch.nn.Parameter(whole.T), whole[1:, 2]]
    before, away = [each.detach().clone() for each in tensors], offload.Away()
    away.put(tensors)
    assert whole.untyped_storage().nbytes() == 0
    if interrupted:
        away.stay()
    away.back()
    assert whole.untyped_storage().nbytes() == (0 if interrupted else 48)
    assert all(map(torch.equal, tensors, before))
    tensors[1].fill_(-1.0)
    assert (tensors[0][2, 1:] == -1).all()


@pytest.mark.parametrize("how", ["ends", "raises", "is interrupted"])
@pytest.mark.parametrize(("free", "moves"), [(5 * GIB, True), (6 * GIB, False)])
def test_a_guest_has_the_device_to_itself_where_it_does_not_fit_beside_the_run(
    model, monkeypatch, free, moves, how
):
    """It asks for 5 GiB, and a GiB is for what two measurements differ by.

    DDP averages gradients in a hook of each weight's node in autograd, which must stay the same.
    """
    for each in (*model.parameters(), *model.buffers()):
        each.data = each.data.clone()  # what was read here is mapped from a file
    weight, saved, averaged = next(model.parameters()), [], []
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: averaged.append(True))

    def away() -> bool:
        return weight.untyped_storage().nbytes() == 0

    def host_saves(number, frame):
        saved.append({name: each.clone() for name, each in model.state_dict().items()})
        raise KeyboardInterrupt

    before = {name: each.clone() for name, each in model.state_dict().items()}
    monkeypatch.setattr(offload, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(offload, "_free", lambda device: (free + 10 * GIB * away(), 24 * GIB))
    handler = signal.signal(signal.SIGINT, host_saves)
    try:
        with offload.waiting(model, torch.device("cuda"), None, 5 * GIB, "a guest") as found:
            assert found == free + 10 * GIB * moves
            assert away() == moves
            if how == "raises":
                raise KeyboardInterrupt
            if how == "is interrupted":
                signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        assert how != "ends"
    finally:
        signal.signal(signal.SIGINT, handler)
    for state in (model.state_dict(), *saved):
        assert all(map(torch.equal, state.values(), before.values()))
    assert len(saved) == (how == "is interrupted")
    model(input_ids=torch.tensor([[1, 5, 7]])).logits.sum().backward()
    assert averaged == [True] or how == "is interrupted"


def test_an_engine_gets_what_all_of_its_devices_have():
    class Four(Ranks):
        def sum(self, values):
            return values + np.where(values == 0, np.array([9.0, 7.0, 5.0, 8.0]), 0)

    frees = [offload._least_free(100, 2, Four(rank, (4,))) for rank in range(4)]
    assert frees == [7, 9, 8, 5]
    assert offload._least_free(100, 2, Ranks()) == 100


class _Second(Ranks):
    """The first rank of a second machine, by itself."""

    def words(self, mine: str) -> list[str]:
        return ["", mine]


def test_a_machine_without_vllm_is_named_before_training():
    store = SimpleNamespace(ranks=_Second(1, (1, 1)))
    samplers = Samplers({}, SeraConfig(), store, None, None)
    with pytest.raises(ValueError, match=r"rank 0's machine, but on \S+ vLLM .*vllm_python"):
        samplers._require_everywhere()
