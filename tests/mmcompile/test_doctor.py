"""The doctor itself: what it finds in a model that works, and in models and compilers that are broken on purpose."""

import json
from dataclasses import replace

import pytest
import torch
from torch._dynamo.backends.registry import register_backend
from transformers import LlamaConfig, LlamaForCausalLM

from mmcompile.diagnosis import Status
from mmcompile.doctor import CHECKS, HALF_TOLERANCE, Doctor, DoctorError, Prompts

LAYERS = 2


def tiny_llama(**fields):
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        pad_token_id=0,
        **fields,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def text(batch, length):
    ids = torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def prompts():
    padded = text(2, 140)
    padded["attention_mask"][0, :37] = 0
    return Prompts(text(1, 130), text(1, 200), text(1, 520), padded)


def doctor(model=None, inner="eager", **changes):
    return Doctor(tiny_llama() if model is None else model, replace(prompts(), **changes), inner=inner)


def broken(change):
    """The name of an inner backend that changes every graph's first floating-point output."""

    def compiler(module, example_inputs):
        def run(*inputs):
            outputs = list(module(*inputs))
            first = next(
                i for i, out in enumerate(outputs) if isinstance(out, torch.Tensor) and out.is_floating_point()
            )
            outputs[first] = change(outputs[first])
            return tuple(outputs)

        return run

    name = f"broken_{change.__name__}"
    if name not in torch._dynamo.list_backends(exclude_tags=()):
        register_backend(compiler, name=name)
    return name


def a_hair_off(output):
    return output + 1e-3


def not_a_number(output):
    return output * float("nan")


def shuffled(output):
    return output.flip(-1)


def crash(output):
    raise RuntimeError("the kernel is on fire\nand so are we")


@pytest.mark.parametrize("check", CHECKS)
def test_a_model_that_works(check):
    result = doctor().check("text model", check)
    assert (result.status, result.rewritten, result.causal) == (Status.WORKS, LAYERS, LAYERS), result.cell()
    assert not result.dense


def test_one_graph_serves_every_length_after_the_second():
    result = doctor().check("text model", "second length")
    assert result.graphs == 2
    assert result.error <= result.allowed


@pytest.mark.parametrize("check", ["no cache", "cache + decode", "padded batch", "second length"])
@pytest.mark.parametrize("change", [a_hair_off, not_a_number])
def test_wrong_logits_are_a_failure_and_say_by_how_much(check, change):
    result = doctor(inner=broken(change)).check("torch.compile", check)
    assert result.status is Status.FAILS
    assert "logits differ by" in result.detail
    assert not result.error <= result.allowed


def test_other_tokens_are_a_failure():
    result = doctor(inner=broken(shuffled)).check("torch.compile", "generate")
    assert result.status is Status.FAILS
    assert "of 8 differs from eager's" in result.detail


def test_nan_in_a_sparse_prefill_is_a_failure():
    result = doctor(inner=broken(not_a_number)).check("torch.compile", "sparse")
    assert (result.status, result.detail) == (Status.FAILS, "logits with NaN or infinity")


def test_what_a_compiled_model_raises_is_a_result():
    result = doctor(inner=broken(crash)).check("mmcompile.compile", "no cache")
    assert (result.status, result.detail) == (Status.FAILS, "RuntimeError: the kernel is on fire")


def test_a_graph_for_every_length_is_a_failure():
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        result = doctor().check("text model", "second length")
    assert (result.status, result.detail) == (Status.FAILS, "a third length compiled 1 graphs again")
    assert result.error <= result.allowed


def test_a_length_that_dynamo_leaves_to_eager_mode_is_a_failure():
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=2):
        result = doctor().check("text model", "second length")
    assert (result.status, result.detail) == (
        Status.FAILS,
        f"0 of {LAYERS} rewritten attentions ran at a third length",
    )


def test_a_model_that_stays_dense_says_why():
    mask = torch.ones(130, 130).tril().bool()[None, None]  # the values of a mask prove nothing about other lengths
    result = doctor(first=text(1, 130) | {"attention_mask": mask}).check("text model", "no cache")
    assert (result.status, result.rewritten, result.causal) == (Status.DENSE, 0, LAYERS)
    assert "opaque mask" in result.detail
    assert result.dense


def test_half_precision_is_held_to_the_error_that_eager_has():
    result = doctor(tiny_llama().bfloat16()).check("text model", "second length")
    assert result.status is Status.WORKS, result.cell()
    assert 1e-4 < result.allowed < HALF_TOLERANCE
    hair = doctor(tiny_llama().bfloat16(), inner=broken(not_a_number)).check("text model", "no cache")
    assert hair.status is Status.FAILS


def test_the_model_itself_is_never_compiled():
    one = doctor()
    one.diagnose(["mmcompile.compile"], ["no cache"])
    assert one.model._compiled_call_impl is None


@pytest.mark.parametrize(("way", "check"), [("by hand", "no cache"), ("text model", "speed")])
def test_an_unknown_name_is_one_clear_error(way, check):
    with pytest.raises(DoctorError, match="must be one of"):
        doctor().check(way, check)


def test_a_prompt_that_eager_refuses_is_one_clear_error():
    with pytest.raises(DoctorError, match="does not run on these prompts before it is compiled"):
        doctor(first={"input_ids": torch.tensor([[10_000]])}).check("text model", "no cache")


def test_a_diagnosis_is_data_a_table_and_a_verdict():
    heard = []
    diagnosis = doctor().diagnose(["text model"], ["no cache", "sparse"], step=heard.append)
    assert heard == ["text model: no cache", "text model: sparse"]
    assert diagnosis.healthy
    told = json.loads(json.dumps(diagnosis.to_dict()))
    assert [result["check"] for result in told["results"]] == ["no cache", "sparse"]
    assert diagnosis.__rich__().row_count == 3  # one names the way
    assert diagnosis.of("text model", "sparse") is diagnosis.results[1]
    with pytest.raises(KeyError):
        diagnosis.of("text model", "generate")
