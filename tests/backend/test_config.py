"""Settings from config.pbtxt, and the shipped config.pbtxt against the tables it repeats."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from artifacts import CHECKOUT
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from dspark_backend.config import EngineConfig
from dspark_backend.errors import ConfigError
from dspark_client.schema import INPUTS, OUTPUTS, TensorSpec

BASE = Path("/models/dspark/1")

# Key -> (text, value) that differs from the default, and texts that must be refused.
KEYS = {
    "verifier": ("../../verifier/2", Path("/models/verifier/2"), [""]),
    "drafter": ("/drafter/1", Path("/drafter/1"), [""]),
    "policy": ("fixed:3", "fixed:3", ["fastest", "fixed:-1", "threshold:2"]),
    "cost_cache": ("costs", Path("/models/dspark/1/costs"), [""]),
    "profile_seconds": ("2.5", 2.5, ["0", "nan", "x"]),
    "max_slots": ("8", 8, ["0", "1025", "eight", "1.5", ""]),
    "kv_budget_mib": ("100", 100, ["0", "-1", "1G"]),
    "max_context": ("512", 512, ["-1", "1", "x"]),
    "max_queue_size": ("5", 5, ["0", "x"]),
    "default_max_tokens": ("16", 16, ["0", "x"]),
    "prefill_chunk": ("64", 64, ["0", "65537", "x"]),
    "prefill_chunk_busy": ("32", 32, ["0", "65537", "x"]),
    "prefix_reuse": ("False", False, ["no", "0", ""]),
    "max_prompt_bytes": ("1000", 1000, ["-1", "x"]),
    "threads": ("2", 2, ["-1", "1025", "x"]),
    "provider": ("cuda", "cuda", ["gpu", "CUDA"]),
    "device": ("1", 1, ["-1", "x"]),
    "engine_cache": ("engines", Path("/models/dspark/1/engines"), [""]),
    "metrics_interval_ms": ("100", 100, ["9", "x"]),
}


def parse(**parameters: str) -> EngineConfig:
    return EngineConfig.from_parameters(
        {"verifier": "../../verifier/1", "drafter": "../../drafter/1"} | parameters, BASE
    )


@pytest.mark.parametrize("key", KEYS)
def test_every_key(key):
    text, value, _ = KEYS[key]
    assert getattr(parse(**{key: f" {text} "}), key) == value
    assert getattr(parse(), key) != value


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, (_, _, bad) in KEYS.items() for text in bad])
def test_bad_values_name_their_key(key, text):
    with pytest.raises(ConfigError, match=f"^{key}: .*expected") as caught:
        parse(**{key: text})
    if text:
        assert text.split(":")[-1] in str(caught.value)


def test_unknown_key():
    with pytest.raises(ConfigError, match=r"max_slot: unknown parameter; expected one of .*max_slots"):
        parse(max_slot="4")


def test_policies_follow_the_drafter():
    alone = EngineConfig.from_parameters({"verifier": "v"}, BASE)
    assert not alone.depth_policy.drafts and parse().depth_policy.drafts
    assert not parse(policy="off").depth_policy.drafts
    with pytest.raises(ConfigError, match="policy: expected off without a drafter, got 'causal'; set the key drafter"):
        EngineConfig.from_parameters({"verifier": "v", "policy": "causal"}, BASE)


def test_no_verifier():
    with pytest.raises(ConfigError, match="verifier: expected the artifact directory"):
        EngineConfig.from_parameters({}, BASE)


def test_absolute_paths_stay():
    assert parse(verifier="/data/model").verifier == Path("/data/model")


def test_the_table_of_this_test_covers_the_settings():
    missing = {field.name for field in fields(EngineConfig)} - KEYS.keys()
    assert not missing, f"add {sorted(missing)} to KEYS"


@pytest.fixture(scope="module")
def config():
    path = CHECKOUT / "model_repository" / "dspark" / "config.pbtxt"
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


class TestRepository:
    @staticmethod
    def rows(tensors) -> list[tuple]:
        names = {"TYPE_STRING": "BYTES"}
        kinds = model_config_pb2.DataType
        return [
            (
                tensor.name,
                names.get(kind := kinds.Name(tensor.data_type), kind.removeprefix("TYPE_")),
                tuple(tensor.dims),
            )
            for tensor in tensors
        ]

    @staticmethod
    def expected(specs: tuple[TensorSpec, ...]) -> list[tuple]:
        return [(spec.name, spec.datatype, spec.shape) for spec in specs]

    def test_tensors_are_those_of_the_schema(self, config):
        assert self.rows(config.input) == self.expected(INPUTS)
        assert self.rows(config.output) == self.expected(OUTPUTS)
        assert all(tensor.optional for tensor in config.input)

    def test_decoupled_without_batching(self, config):
        assert config.model_transaction_policy.decoupled and config.max_batch_size == 0
        assert config.backend == "python" and config.instance_group[0].count == 1

    def test_parameters_are_settings(self, config, tmp_path):
        parameters = {key: value.string_value for key, value in config.parameters.items()}
        base = tmp_path / "models" / "dspark" / "1"
        settings = EngineConfig.from_parameters(parameters, base)
        assert settings.verifier == (tmp_path / "models" / "verifier" / "1").resolve()

    def test_the_verifier_model(self):
        path = CHECKOUT / "model_repository" / "verifier" / "config.pbtxt"
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        assert self.rows(config.input) == [("input_ids", "INT32", (-1,))]
        assert self.rows(config.output) == [
            ("argmax", "INT32", (-1,)),
            ("log_probs", "FP32", (-1,)),
            ("logits", "FP32", (-1, -1)),
        ]
