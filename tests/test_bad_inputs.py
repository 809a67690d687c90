"""Bad input ends with exit code 2 and a line or two, leaves nothing, and is never taken as something else."""

import copy
import json
import math
import sys
import time

import pytest
from bad_inputs import BAD, BAD_VALUES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ulysses_exp import config as schema
from ulysses_exp.cli import main
from ulysses_exp.cli.user_errors import check_overrides, hydra_text, user_message
from ulysses_exp.config import Config, ConfigError, bounds
from ulysses_exp.config.composing import composed as compose
from ulysses_exp.config.paths import CONF
from ulysses_exp.experiment import before_start, model_check


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the command sets it: taken back afterwards
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module", autouse=True)
def reader():
    yield
    model_check.close()


def refused(monkeypatch, capsys, *words: str) -> str:
    """What the command says; it has to be short, in time, and all that is left of it."""
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    said = out + err
    assert ended.value.code == 2, said
    assert "Traceback" not in said
    lines = err.strip().splitlines()
    if "-m" in words:  # a line a reason, and the count
        lines = said.strip().splitlines()
        lines = [line for line in lines if not line.startswith("sweep: ")]
    else:
        assert not out
    assert 1 <= len(lines) <= 2 and max(map(len, lines)) < 300, said
    assert said.isprintable() or {c for c in said if not c.isprintable()} == {"\n"}
    assert time.monotonic() - began < 15
    return said


def by_idea():
    """Each idea once; its further values, which go the same way, are among the long tests."""
    seen = set()
    for words, named in BAD:
        marks = [pytest.mark.long] if (named, words[0].partition("=")[0]) in seen else []
        seen.add((named, words[0].partition("=")[0]))
        yield pytest.param(words, named, id=" ".join(words)[:80], marks=marks)


@pytest.mark.parametrize(("words", "named"), list(by_idea()))
def test_bad_input_is_refused_in_a_line(monkeypatch, capsys, tmp_path, words, named):
    assert named in refused(monkeypatch, capsys, *words)
    assert not list(tmp_path.iterdir())


# -- generated ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed():
    return compose([])[0]


TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="[]{}()<>/\\'\"$:,=@#%&*!?~^|; \t\n\r\x00\x07\x1b\x7f\u200b\u2028☃ü", max_size=20),
    st.sampled_from(["", " ", ".", "..", "../x", "[/red]", "\x1b[31m", "nan", "null", "true", "x" * 2000, "$\\frac{"]),
)
NUMBERS = st.one_of(
    st.integers(),
    st.integers(-5, 600),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 5e-324, -0.0, 2**63, 2**64, 10**40, -(2**63)]),
)
VALUES = st.one_of(TEXTS, NUMBERS, st.booleans(), st.none(), st.lists(st.one_of(TEXTS, NUMBERS), max_size=3))


def typed(value: object) -> str:
    """As a user who quotes everything would type it."""
    if isinstance(value, str):
        return hydra_text(value)
    if isinstance(value, list):
        return "[" + ",".join(map(typed, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def taken(cfg, key: str, override: str) -> object:
    """The value that `key` has in the checked configuration after `override`; raises what the command would."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (parsed,) = OverridesParser.create().parse_overrides([override])
    check_overrides([parsed], CONF)
    before = copy.deepcopy(OmegaConf.select(cfg, key))  # a list is changed where it is
    try:
        OmegaConf.update(cfg, key, parsed.value(), merge=True)
        config = schema.typed(cfg)
        schema.check(config)
        before_start.check(config)
    finally:
        OmegaConf.update(cfg, key, before, merge=False)
    return next(value for name, value, _ in bounds.leaves(config) if name == key)


TRUE, FALSE = ("1", "1.0", "true", "yes", "on", "y"), ("0", "0.0", "-0.0", "false", "no", "off", "n")


def same(value: object, taken: object) -> bool:
    if isinstance(value, list) and isinstance(taken, list):
        return len(value) == len(taken) and all(map(same, value, taken))
    if isinstance(taken, bool) and not isinstance(value, bool):
        return str(value).lower() in (TRUE if taken else FALSE)
    if isinstance(taken, (int, float)) and isinstance(value, str):
        return float(value) == taken
    return value == taken or str(value) == taken


def outcome(cfg, key: str, override: str) -> tuple[str | None, object]:
    """(what the command says, None) where it refuses `override`, else (None, the value that it takes)."""
    from hydra.errors import HydraException

    try:
        return None, taken(cfg, key, override)
    except (ConfigError, OmegaConfBaseException, HydraException, ValueError) as error:
        said = user_message(error, CONF, [override])
        assert said is not None, f"{override!r}: {error!r}"
    assert len(said.splitlines()) <= 2 and max(map(len, said.splitlines())) < 300, said
    assert said.replace("\n", "").isprintable(), said
    return said, None


@pytest.mark.parametrize("key", BAD_VALUES)
def test_a_bad_value_is_refused(composed, key):
    for value in BAD_VALUES[key]:
        said, got = outcome(composed, key, f"{key}={value}")
        assert said is not None, f"{key}={value} is taken as {got!r}"
        assert key in said


KEYS = [key for key, _, _ in bounds.leaves(Config()) if key != "model.architecture"]


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_a_value_is_taken_as_it_was_typed_or_refused(composed, key, value):
    override = f"{key}={typed(value)}"
    said, got = outcome(composed, key, override)
    assert said is not None or same(value, got), f"{override!r} is taken as {got!r}"


def test_every_number_of_the_schema_has_bounds():
    numbers = {key for key, _, kind in bounds.leaves(Config()) if {int, float} & {kind, *getattr(kind, "__args__", ())}}
    assert numbers == set(bounds.BOUNDS)


@pytest.mark.parametrize("key", bounds.BOUNDS)
def test_ends_of_bounds(key):
    limits = bounds.BOUNDS[key]
    ends = ((limits.least, limits.open in ("least", "both")), (limits.most, limits.open in ("most", "both")))
    for end, is_open in ends:
        if is_open:
            with pytest.raises(ConfigError, match=key):
                bounds.check_number(key, end)
        else:
            bounds.check_number(key, end)
    for beyond in (limits.least - 1, limits.most + 1, math.nan, math.inf, -math.inf):
        with pytest.raises(ConfigError, match=key):
            bounds.check_number(key, beyond)


# -- the environment, and folders that are damaged ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OMP_NUM_THREADS", "0"),
        ("OMP_NUM_THREADS", "abc"),
        ("OMP_NUM_THREADS", "-1"),
        ("OMP_NUM_THREADS", ""),
        ("GLOO_SOCKET_IFNAME", "nonsense"),
        ("GLOO_SOCKET_IFNAME", "lo,eth99"),
    ],
)
def test_a_variable_that_ranks_would_fail_on_is_named(monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    assert name in refused(monkeypatch, capsys, "device=cpu")


def test_fewer_ranks_attached_than_the_layout_needs(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert "MASTER_ADDR" in refused(monkeypatch, capsys, "launch=attached")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "needs 4 ranks, 2 are attached" in refused(monkeypatch, capsys, "launch=attached", "sp.size=4")


LLAMA = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip

GPT2 = {"model_type": "gpt2", "resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0}


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"config.json": "{bad"}, "config.json"),
        ({"config.json": "[1, 2]"}, "config.json"),
        ({"config.json": b"\xe9\xff\x00"}, "config.json"),
        ({"config.json": "[" * 100_000}, "config.json"),
        ({"config.json": "{}"}, "model_type"),
        ({"config.json": json.dumps(LLAMA | {"num_attention_heads": "x"})}, "num_attention_heads"),
        ({"config.json": json.dumps(LLAMA | {"hidden_size": 66})}, "hidden size"),
        ({"config.json": json.dumps({"model_type": "vit"})}, "vit"),
        ({"config.json": json.dumps({"model_type": "bert", "hidden_dropout_prob": 0})}, "is_decoder"),
        ({"config.json": json.dumps({"model_type": "mamba"})}, "no attention"),
        ({"config.json": json.dumps(LLAMA | {"max_position_embeddings": 16})}, "max_position_embeddings"),
        ({"config.json": json.dumps(GPT2 | {"n_positions": 16})}, "n_positions"),
        ({"config.json": json.dumps({"auto_map": {"AutoConfig": "evil.C"}, "model_type": "evil"})}, "evil"),
        ({"config.json": json.dumps(LLAMA), "tokenizer.json": "{bad", "tokenizer_config.json": "{}"}, "no tokenizer"),
        ({"config.json": json.dumps(LLAMA), "tokenizer_config.json": "[]"}, "no tokenizer"),
    ],
)  # fmt: skip
def test_a_damaged_model_folder(monkeypatch, capsys, tmp_path, files, named):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    words = ("model=hub", f"model.name_or_path={folder}", "model.pretrained=false", "sp.size=1")
    said = refused(monkeypatch, capsys, *words)
    assert named in said


@pytest.mark.parametrize("index", [None, "{bad", '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "{}"])
def test_a_model_folder_without_its_weights(monkeypatch, capsys, tmp_path, index):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(index)
    said = refused(monkeypatch, capsys, "model=hub", f"model.name_or_path={folder}")
    if index in ("{bad", "{}"):  # what is wrong with the file says more
        assert "model.safetensors.index.json: " in said
    else:
        assert "weights" in said and "model.pretrained=false" in said


def test_data_without_a_token(monkeypatch, capsys, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "empty.txt").touch()
    said = refused(monkeypatch, capsys, "data=hub", f"data.dataset={tmp_path / 'data'}", f"data.tokenizer={tmp_path}")
    assert "data.dataset" in said and "0 bytes" in said


# -- and what is right stays right ----------------------------------------------------------------------------


@pytest.mark.parametrize("choice", sorted(p.stem for p in (CONF / "model").glob("*.yaml") if p.stem != "hub"))
def test_shipped_models_are_right_without_asking(monkeypatch, choice):
    """The check trusts them; here they go through it."""
    config = schema.typed(compose([f"model={choice}", "stages=[plan]"])[0])
    monkeypatch.setattr(model_check, "_shipped", lambda name: None)
    model_check.check(config)


ROPE = "+model.architecture.rope_parameters={rope_type: dynamic, factor: 2.0, rope_theta: 10000.0}"


@pytest.mark.parametrize(
    "words",
    [
        ["model.architecture.num_hidden_layers=2"],
        ["+model.architecture.rope_theta=5000"],
        ["+model.architecture.attention_bias=true"],
        ["model=tiny_mistral", "model.architecture.sliding_window=24"],
        ["model=qwen3_8b", "train.seq_len=131072", "stages=[plan]"],
        ["model.architecture.max_position_embeddings=256", ROPE, "sp.size=1", "reload.layouts=[sp1-dp1-z0]"],
        ["train.compile=1", "device=cpu"],
        ["seed=9223372036854775807"],
        ["train.seq_len=3_2"],
        ['tracker.tags=["a b"]'],
    ],
)  # fmt: skip
def test_odd_but_right(words):
    config = schema.resolve(compose(words)[0])
    before_start.check(config)
