"""Secrets of the environment reach no configuration, log or result."""

from __future__ import annotations

import json
import logging
import os

import pytest

from ulysses_exp.cli.command import sweep_overrides
from ulysses_exp.config import ConfigError, redaction
from ulysses_exp.launch import failure

SECRETS = {"WANDB_API_KEY": "0123456789abcdef" * 2, "HF_TOKEN": "hf_FAKE", "AWS_SECRET_ACCESS_KEY": 'wJal/"K7\\',
           "MY_PASSWORD": "hunter22", "GOOGLE_CREDENTIALS": "gcp-fake-1"}  # fmt: skip
HARMLESS = {"TOKENIZERS_PARALLELISM": "falsefalse", "KEYBOARD": "english", "MONKEYS": "capuchin", "SHORT_TOKEN": "abc",
            "SSL_KEY": os.devnull}  # fmt: skip


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SECRETS | HARMLESS).items():
        monkeypatch.setenv(name, value)


def test_variables_are_secret_by_their_names() -> None:
    known = redaction.environment_secrets()
    assert SECRETS.items() <= {name: value for value, name in known.items()}.items()
    assert not known.keys() & set(HARMLESS.values())


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_refused_in_a_configuration(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^data.split: holds the environment variable {name}") as refused:
        redaction.check_configuration({"seed": 1, "data": {"split": f"before {SECRETS[name]} after"}})
    assert SECRETS[name] not in str(refused.value)
    for override in (
        f"data.split={SECRETS[name]}",
        f"+model.x='${{oc.env:{name}}}'",
        f"hydra.run.dir=a/${{oc.env:{name},b}}",
    ):
        with pytest.raises(ConfigError, match=name):
            redaction.check_overrides(["seed=1", override])


def test_one_that_comes_by_composition_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INNOCENT", "HF_TOKEN")
    with pytest.raises(ConfigError, match=r"^data\.split: holds the environment variable HF_TOKEN"):
        sweep_overrides(["data.split='${oc.env:${oc.env:INNOCENT}}'"], multirun=False)


def test_errors_are_written_without_them(tmp_path) -> None:
    try:
        raise OSError(f"cannot log in with {SECRETS['HF_TOKEN']} and {SECRETS['AWS_SECRET_ACCESS_KEY']}")
    except OSError as error:
        failure.record(tmp_path, 0, error)
        record = logging.LogRecord(
            "x", logging.ERROR, "x", 1, "failed %s", (SECRETS["MY_PASSWORD"],), (OSError, error, None)
        )
    told = failure.first_failure(tmp_path, {0: 1})
    line = redaction.Redacting("%(message)s").format(record)
    results = redaction.redacted_results(
        {"error": str(told), "loss": [1.0], "stages": [{"reason": SECRETS["HF_TOKEN"]}]}
    )
    everything = str(told) + told.trace + line + json.dumps(results) + (tmp_path / "error-rank0.json").read_text()
    assert not [value for value in SECRETS.values() if value in everything or json.dumps(value)[1:-1] in everything]
    assert "cannot log in with ***" in str(told) and results["loss"] == [1.0]


def test_a_configuration_is_masked_by_its_names() -> None:
    plain = {"hub": {"token": "x", "api_key": "y"}, "tokenizer": "bytes", "empty_token": "", "list": [{"secret": 1}]}
    masked = {
        "hub": {"token": "***", "api_key": "***"},
        "tokenizer": "bytes",
        "empty_token": "",
        "list": [{"secret": "***"}],
    }
    assert redaction.without_secrets(plain) == masked
