"""Tiny models of transformers by their kind, without a download, and padded batches for them."""

import torch
import torch.nn.functional as F

VOCABULARY, LENGTH = 19, 6
LENGTHS = (6, 3, 6, 4, 2)
CLASSES, NEXT, PAIRS = (
    "AutoModelForSequenceClassification",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
)

BASE = {
    **{"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 12, "max_position_embeddings": 32, "num_labels": 3},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "use_cache": False},
    **{"attention_dropout": 0.0, "hidden_dropout": 0.0},
}
GPT = {
    **{"n_embd": 8, "n_layer": 2, "n_head": 2},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
ONE = {"num_key_value_heads": 1}
HEAD = {**ONE, "head_dim": 4}
TWO = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 8, "decoder_start_token_id": 2}
BART = {
    **TWO,
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "dropout": 0.0, "activation_dropout": 0.0},
}
T5 = {
    **{"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2},
    **{"dropout_rate": 0.0, "decoder_start_token_id": 0},
}
XLM = {"emb_dim": 8, "n_layers": 2, "n_heads": 2, "dropout": 0.0, "summary_first_dropout": 0.0}
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
# Weights of experts in float64 take the loop over experts; their grouped kernels are float32's.
EXPERTS = {**ONE, "num_experts_per_tok": 2, "experts_implementation": "eager"}
LOCAL = {**EXPERTS, "num_local_experts": 3}
MANY = {**EXPERTS, "num_experts": 3, "moe_intermediate_size": 6}
DEEPSEEK = {
    **{**MANY, "num_key_value_heads": 2, "n_routed_experts": 4, "first_k_dense_replace": 1},
    **{"kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
    **{"v_head_dim": 4, "n_group": 2, "topk_group": 1},
}
SSM = {"state_size": 4}

# What the configuration is called -> what the model does, and the options of its own.
MODELS = {
    "albert": (CLASSES, {"embedding_size": 6, "classifier_dropout_prob": 0.0}),
    "bert": (CLASSES, {}),
    "big_bird": (CLASSES, {"attention_type": "original_full"}),
    "camembert": (CLASSES, {}),
    "convbert": (CLASSES, {"embedding_size": 8}),
    "data2vec-text": (CLASSES, {}),
    "deberta": (CLASSES, DEBERTA),
    "deberta-v2": (CLASSES, {**DEBERTA, "position_buckets": 4}),
    "distilbert": (
        CLASSES,
        {
            **{"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12},
            **{"dropout": 0.0, "seq_classif_dropout": 0.0},
        },
    ),
    "electra": (CLASSES, {"embedding_size": 6}),
    "ernie": (CLASSES, {}),
    "flaubert": (CLASSES, XLM),
    "fnet": (CLASSES, {}),
    "ibert": (CLASSES, {}),
    "layoutlm": (CLASSES, {}),
    "luke": (CLASSES, {"entity_vocab_size": 5, "entity_emb_size": 8}),
    "megatron-bert": (CLASSES, {}),
    "mobilebert": (
        CLASSES,
        {"embedding_size": 8, "true_hidden_size": 8, "intra_bottleneck_size": 8},
    ),
    "modernbert": (CLASSES, {"global_attn_every_n_layers": 2, "local_attention": 4}),
    "mpnet": (CLASSES, {}),
    "rembert": (
        CLASSES,
        {
            **{"input_embedding_size": 6, "output_embedding_size": 6},
            "classifier_dropout_prob": 0.0,
        },
    ),
    "roberta": (CLASSES, {}),
    "roformer": (CLASSES, {"embedding_size": 6}),
    "squeezebert": (
        CLASSES,
        {
            **{"embedding_size": 8, "q_groups": 1, "k_groups": 1, "v_groups": 1},
            **{"post_attention_groups": 1, "intermediate_groups": 1, "output_groups": 1},
        },
    ),
    "xlm": (CLASSES, XLM),
    "xlm-roberta": (CLASSES, {}),
    "biogpt": (NEXT, {"activation_dropout": 0.0}),
    "bloom": (NEXT, {"n_layer": 2, "n_head": 2}),
    "codegen": (NEXT, {**GPT, "n_embd": 16, "n_head": 4, "rotary_dim": 2}),
    "cohere": (NEXT, ONE),
    "ctrl": (NEXT, {**GPT, "dff": 12}),
    "deepseek_v2": (NEXT, {**DEEPSEEK, "n_group": 1}),
    "deepseek_v3": (NEXT, DEEPSEEK),
    "falcon": (NEXT, {}),
    "falcon_mamba": (NEXT, SSM),
    "gemma": (NEXT, HEAD),
    "gemma3_text": (NEXT, {**HEAD, "sliding_window": 3}),
    "glm": (NEXT, HEAD),
    "gpt2": (NEXT, GPT),
    "gpt_bigcode": (NEXT, GPT),
    "gpt_neo": (
        NEXT,
        {
            **{"num_layers": 2, "num_heads": 2, "window_size": 3},
            **{"attention_types": [[["global", "local"], 1]]},
            **{"embed_dropout": 0.0, "resid_dropout": 0.0},
        },
    ),
    "gpt_neox": (NEXT, {}),
    "gpt_oss": (NEXT, {**LOCAL, "head_dim": 4, "sliding_window": 3}),
    "gptj": (NEXT, {**GPT, "rotary_dim": 4}),
    "granite": (NEXT, ONE),
    "granitemoe": (NEXT, LOCAL),
    "jamba": (
        NEXT,
        {
            **{**MANY, "num_experts": 2, "num_experts_per_tok": 1},
            **{"attn_layer_period": 2, "attn_layer_offset": 1},
            **{"expert_layer_period": 2, "expert_layer_offset": 1},
            **{"use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 2},
        },
    ),
    "jetmoe": (NEXT, {**LOCAL, "num_key_value_heads": 2, "kv_channels": 4}),
    "llama": (NEXT, ONE),
    "mamba": (NEXT, SSM),
    "mamba2": (
        NEXT,
        {**SSM, "num_heads": 4, "head_dim": 4, "expand": 2, "n_groups": 1, "chunk_size": 4},
    ),
    "mistral": (NEXT, {**ONE, "sliding_window": 3}),
    "mixtral": (NEXT, LOCAL),
    "mpt": (NEXT, {"d_model": 8, "n_heads": 2, "n_layers": 2}),
    "nemotron": (NEXT, ONE),
    "olmo": (NEXT, ONE),
    "olmo2": (NEXT, ONE),
    "olmoe": (NEXT, MANY),
    "openai-gpt": (NEXT, GPT),
    "opt": (NEXT, {"ffn_dim": 12, "dropout": 0.0, "word_embed_proj_dim": 8}),
    "persimmon": (NEXT, ONE),
    "phi": (NEXT, {"resid_pdrop": 0.0}),
    "phi3": (NEXT, {"resid_pdrop": 0.0}),
    "phimoe": (NEXT, LOCAL),
    "qwen2": (NEXT, ONE),
    "qwen2_moe": (NEXT, {**MANY, "shared_expert_intermediate_size": 6}),
    "qwen3": (NEXT, HEAD),
    "qwen3_moe": (NEXT, {**MANY, "head_dim": 4}),
    "recurrent_gemma": (
        NEXT,
        {
            **{**ONE, "lru_width": 8, "attention_window_size": 3},
            "block_types": ["recurrent", "attention"],
        },
    ),
    "rwkv": (NEXT, {"attention_hidden_size": 8}),
    "smollm3": (NEXT, ONE),
    "stablelm": (NEXT, ONE),
    "starcoder2": (NEXT, {**ONE, "residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "xglm": (
        NEXT,
        {"d_model": 8, "num_layers": 2, "attention_heads": 2, "ffn_dim": 12, "dropout": 0.0},
    ),
    "bart": (PAIRS, BART),
    "bigbird_pegasus": (PAIRS, {**BART, "attention_type": "original_full"}),
    "blenderbot": (PAIRS, BART),
    "blenderbot-small": (PAIRS, BART),
    "longt5": (PAIRS, {**T5, "local_radius": 2}),
    "m2m_100": (PAIRS, {**BART, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}),
    "marian": (PAIRS, BART),
    "mbart": (PAIRS, BART),
    "mt5": (PAIRS, T5),
    "nllb-moe": (
        PAIRS,
        {
            **{**BART, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "num_experts": 2},
            **{"encoder_sparse_step": 1, "decoder_sparse_step": 1, "expert_capacity": 16},
            **{"moe_token_dropout": 0.0, "router_jitter_noise": 0.0},
        },
    ),
    "pegasus": (PAIRS, BART),
    "plbart": (PAIRS, BART),
    "switch_transformers": (
        PAIRS,
        {
            **{**T5, "num_layers": 2, "num_experts": 2, "router_jitter_noise": 0.0},
            **{"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        },
    ),
    "t5": (PAIRS, T5),
    "umt5": (PAIRS, T5),
}


def build(kind):
    """Build a model in training mode, in the default dtype, with no parameter at zero or one."""
    import transformers

    task, options = MODELS[kind]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**BASE, **options})
    if "experts_implementation" in options:
        config._experts_implementation = options["experts_implementation"]
    model = getattr(transformers, task).from_config(config).to(torch.get_default_dtype())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.train()


def padded(kind):
    """Return five texts as a collator pads them: two are the longest, and have no padding."""
    task, _ = MODELS[kind]
    there = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, VOCABULARY, there.shape, generator=generator)
    labels = torch.where(there, words, -100)
    return {
        "input_ids": torch.where(there, words, 0),
        "attention_mask": there.long(),
        "labels": {
            CLASSES: torch.arange(len(LENGTHS)) % 3,
            NEXT: labels,
            PAIRS: labels.flip(0),
        }[task],
    }


def criterion(kind):
    """Compute the model's loss in the dtype of the logits; its own loss is in float32."""
    task, _ = MODELS[kind]

    def loss(output, batch):
        logits, labels = output.logits, batch["labels"]
        if task == NEXT:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    return loss
