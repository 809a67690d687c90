"""Overrides that no job can run with, and a part of the line that refuses them: found by hand, one idea each."""

HUGE = "9" * 5000

#: Values of keys as they are typed; none is one that the key takes
BAD_VALUES = {
    "sp.size": ["2.5", "true", "null", "[1,2]", "{a:1}", "", "1e12", "0", "-1", "1000000000000"],
    "optim.lr": ["fast", "[0.1]", "null", "true", "{a:1}", "nan", "inf", "-inf", "-1", "1e308"],
    "optim.weight_decay": ["nan", "inf", "-1", "1e308"],
    "optim.eps": ["nan", "inf", "-1", "0", "2"],
    "optim.grad_clip": ["nan", "inf", "-1"],
    "optim.beta1": ["nan", "inf", "-1", "1.5", "1"],
    "optim.beta2": ["nan", "inf", "-1", "1.5", "1"],
    "train.compile": ["2", "-1", "maybe", "null", "[true]", "0.5"],
    "train.steps": ["0", "1e3", "1000000000000000000", "5 6", "${optim.lr}", "${train.steps}", "???"],
    "train.log_every": ["100000000000000"],
    "train.unmeasured_steps": ["1000000000000000000000"],
    "stages": ["train", "null", "{train:1}", "[[train]]", "[null]", "${seed}", "[]", "[train,train]", "[trian]"],
    "tracker.tags": ["5", "{a:1}", "[[1]]", "[" + "x" * 65 + "]"],
    "tracker.project": ["..", "a/b", "x" * 129],
    "tracker.entity": ["../../x", '"a b"'],
    "sweep.name": [".", "..", "../x", "x" * 101, '""', "1.50"],
    "model.name": ["a/b/c", "../../x", "x" * 5000, '"a\tb"', '"ünï☃"', "..", "1.10", "true"],
    "data.text_column": ['"a\x1b[31mb"'],
    "data.name": ["nonsense"],
    "optim.name": ["adam"],
    "launch.name": ["ssh"],
    "sp.attention": ["nonsense", "paged|sdpa", "eager", "kernels-community/flash-attn"],
    "checkpoint.keep": ["all", "0"],
    "checkpoint.every": ["1.5", "-1"],
    "reload.layouts": ["[null]", "sp1-dp1-z0", "[sp0-dp1-z0]", "[sp2]", "[sp99999999-dp1-z0]", "[sp1-dp1-z9]"],
    "parity.tolerance": ["nan", "inf", "-1", "2"],
    "parity.reference": ["sp2-dp1-z0", "nonsense"],
    "longest.memory_gib": ["nan", "1e300", "0", "-1"],
    "longest.within": ["nan", "0", "1"],
    "seed": ["-1", "9223372036854775808", "99999999999999999999999", "9" * 300],
    "launch.timeout_s": ["0", "nan", "100000000000000"],
    "data.ignore_labels": ["nan", "1", "-0.1"],
    "data.mean_document": ["100000000000000"],
    "zero.param_persistence_threshold": ["100000000000000000000", "-1"],
    "eval.sequences": ["1000000000", "0"],
}

#: (words of the command line, what the message names)
BAD = [
    (["train.steps.x=5"], "train.steps"),
    (["sp.size=two words"], "sp.size"),
    (["optim.lr=inf"], "optim.lr"),
    ([f"seed={HUGE}"], "seed"),
    (["sp=5"], "sp: '5' is not a choice; set sp.size=5"),
    (["eval=false"], "eval: 'False' is not a choice; choose from auto, both"),
    (["sp=[1]"], "sp:"),
    (["train=null"], "train"),
    (["model.architecture=5"], "model.architecture"),
    (["model.architecture=null"], "model.architecture"),
    (["optim=sgd", "optim.momentum=nan"], "optim.momentum"),
    (["optim=sgd", "optim.momentum=5"], "optim.momentum"),
    (["stages=[plan]", "dp.size=100000000", "train.global_batch_size=100000000"], "dp.size"),
    (["optim.schedule=cosine", "optim.warmup_steps=100000000000000000000"], "optim.warmup_steps"),
    (["optim.schedule=linear", "optim.warmup_steps=50"], "optim.warmup_steps"),
    # groups and keys
    *[
        ([f"model={value}"], "model")
        for value in ("5", "null", "", "../config", "/etc/passwd", "a b", "[tiny_llama,hub]")
    ],
    (["experiment=[sp_scaling,zero_stages]"], "experiment"),
    (["zero=stage0,stage4"], "zero"),
    (["+model=tiny_llama"], "+model"),
    (["~model"], "~model"),
    (["~stages"], "~stages"),
    (["~train.steps"], "train.steps"),
    (["model@foo=tiny_llama"], "model@foo"),
    (["modle=tiny_llama"], "did you mean model?"),
    (["+a.b.c=1"], "a: unknown"),
    (["hydra=5"], "group"),
    (["hydra.foo=1"], "hydra.foo"),
    (["hydra/launcher=foo"], "hydra/launcher"),
    (["hydra.mode=FOO"], "hydra.mode"),
    (["hydra.run.dir=[1]"], "hydra.run.dir"),
    (["hydra.searchpath=5"], "hydra.searchpath"),
    (["defaults=5"], "defaults"),
    # what cannot be read
    *[
        ([override], override.split("=")[0][:20])
        for override in ("*=1", "a b=5", ".=1", "train..steps=1", "@=1", "=5", "sp.size", "train.steps==5", "x y z")
    ],
    (["stages=[train"], "stages=[train"),
    (["model.name='x"], "model.name="),
    (["model.name='it''s'"], "model.name="),
    (["model.name=ünï☃"], "'model.name=\"ünï☃\"'"),
    (["model.name=${foo"], "model.name="),
    (["model.name=${oc.env:NOT_IN_ANY_ENVIRONMENT}"], "NOT_IN_ANY_ENVIRONMENT"),
    (["model.name=${nope:1}"], "nope"),
    (["train.steps=${train.steps}"], "train.steps"),
    (["train.steps=${optim.lr}"], "train.steps"),
    (["train.steps=???"], "train.steps"),
    (["train.steps=foo(1)"], "foo"),
    (["train.steps=choice(1,2)"], "add -m"),
    (["--steps=5"], "--steps"),
    (["--lr", "0.1"], "--lr"),
    (["--cfg", "nonsense"], "--cfg"),
    # the model's configuration
    *[
        ([f"model.architecture.num_attention_heads={value}"], "num_attention_heads")
        for value in ("abc", "0", "-8", "1.5", "true", "null", "1000000")
    ],
    *[([f"model.architecture.num_hidden_layers={value}"], "num_hidden_layers") for value in ("0", "-1", "1e9", "null")],
    *[([f"model.architecture.vocab_size={value}"], "vocab_size") for value in ("abc", "-5", "10", "null")],
    *[([f"model.architecture.hidden_size={value}"], "hidden_size") for value in ("0", "130", "99999999999")],
    *[
        ([f"model.architecture.model_type={value}"], named)
        for value, named in (
            ("bert", "is_decoder"),
            ("roberta", "is_decoder"),
            ("modernbert", "no causal LM"),
            ("vit", "no causal LM"),
            ("t5", "no causal LM"),
            ("clip", "no causal LM"),
            ("lama", "did you mean llama"),
            ("nonsense", "no model of this version"),
            ("5", "model_type"),
        )
    ],
    (["+model.architecture.num_hiden_layers=7"], "did you mean num_hidden_layers?"),
    (["+model.architecture.is_causal=false"], "is_causal"),
    (["model=tiny_gpt2", "sp.exchange=deepspeed"], "set sp.exchange=fused"),
    (["model=tiny_gemma3", "+model.architecture.use_bidirectional_attention=true"], "use_bidirectional_attention"),
    (["model.architecture.max_position_embeddings=8"], "max_position_embeddings=8"),
    (["+model.architecture.hidden_act=evil"], "hidden_act"),
    (["+model.architecture.rope_theta=0"], "rope_theta"),
    (["+model.architecture.rms_norm_eps=nan"], "rms_norm_eps"),
    (["+model.architecture.rms_norm_eps=-1"], "rms_norm_eps"),
    (["+model.architecture.initializer_range=nan"], "initializer_range"),
    (["+model.architecture.initializer_range=7"], "initializer_range"),
    (["+model.architecture.rope_parameters.rope_type=evil"], "rope_type"),
    (["model=llama3_8b", "model.architecture.rope_parameters.factor=nan"], "rope_parameters"),
    (["+model.architecture.tie_word_embeddings=3"], "tie_word_embeddings"),
    (["+model.architecture._target_=os.system"], "_target_"),
    *[
        ([f"+model.architecture.{setting}"], "model.architecture." + setting.partition("=")[0])
        for setting in (
            "dtype=float16",
            "torch_dtype=banana",
            "return_dict=false",
            "use_cache=true",
            "output_attentions=true",
            "output_hidden_states=true",
            "attn_implementation=eager",
            "_attn_implementation=eager",
            "auto_map={AutoModelForCausalLM: evil.M}",
            "trust_remote_code=true",
            "quantization_config={bits: 4}",
            "architectures=[A]",
        )
    ],
    # what is not there
    *[
        (["model=hub", f"model.name_or_path={value}"], "model.name_or_path")
        for value in ("/nonexistent", "/etc", "/etc/passwd", "./x", "a/b/c", "~/not/there")
    ],
    (["data.tokenizer=/nonexistent"], "data.tokenizer"),
    (["data.tokenizer='not a name'"], "data.tokenizer"),
    (["data=hub", "data.dataset=/nonexistent"], "data.dataset"),
    *[
        ([f"checkpoint.source={value}"], "checkpoint.source")
        for value in ("/nonexistent", "/etc/passwd", "/etc", "''", "/proc/self")
    ],
    *[
        (["stages=[plan]", f"plan.hardware={value}"], "plan.hardware")
        for value in ("h1000", "/etc/passwd", "../../etc/passwd", "/nonexistent.yaml")
    ],
    (["dp.size=64", "train.global_batch_size=64"], "128 ranks"),
    (["launch=attached"], "torchrun"),
    # several jobs
    (["-m", "sp.size=3,5"], "skipped 2 jobs"),
    (["-m", "model=tiny_llama,tiny_lama"], "tiny_lama"),
    (["-m", "train.steps=1,abc"], "train.steps"),
    (["-m", "sp.exchange=a,'[/red]x'"], "[/red]x"),
    (["sp.size=3", "-m", "zero.stage=1,2"], "skipped 2 jobs"),
    (["-m", "zero=stage0,stage3", "model=tiny_llama,tiny_qwen3", "sp.size=3"], "skipped 4 jobs"),
    (["-m", "+train.foo=1,2"], "train.foo"),
]
