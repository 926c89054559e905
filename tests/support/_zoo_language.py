"""Models of transformers in tiny configurations, with padding masks and their own losses."""

import torch

from _zoo_case import Case, token_loss

VOCABULARY, LENGTH, PAD = 19, 6, 0
SMALL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def of(model, config, attention="sdpa", **options):
    """Build a model by the names of its class and its configuration's class."""

    def build():
        import transformers

        made = getattr(transformers, config)(**options)
        made._attn_implementation = attention
        return getattr(transformers, model)(made).to(torch.get_default_dtype()).train()

    return build


def padded(n):
    """Make tokens with padding on the right, of another length in every sample."""
    ids = torch.randint(3, VOCABULARY, (n, LENGTH))
    there = torch.arange(LENGTH) < 2 + torch.arange(n)[:, None] % (LENGTH - 1)
    return torch.where(there, ids, PAD), there.long()


def next_tokens(n):
    ids, mask = padded(n)
    labels = torch.where(mask == 1, ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}


def shifted_loss(output, batch):
    """Compute the loss of the next token in the dtype of the logits; the models' own is float32."""
    return token_loss(output.logits[:, :-1], batch["labels"][:, 1:])


def classes(n):
    ids, mask = padded(n)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(n) % 3}


def pictures(n):
    return {"pixel_values": torch.randn(n, 3, 8, 8), "labels": torch.arange(n) % 3}


def pairs(n):
    ids, mask = padded(n)
    labels = torch.where(mask == 1, ids, -100).flip(1)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}


GPT2 = {
    **SMALL,
    **{"n_positions": LENGTH, "n_embd": 8, "n_layer": 2, "n_head": 2},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
BERT = {
    **SMALL,
    **NO_DROPOUT,
    **{"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 12, "max_position_embeddings": LENGTH, "num_labels": 3},
}
LLAMA = {
    **SMALL,
    **{"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "intermediate_size": 12, "max_position_embeddings": LENGTH},
}
T5 = {
    **SMALL,
    **{"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0},
    "decoder_start_token_id": PAD,
}
BART = {
    **SMALL,
    **{"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": LENGTH},
    "decoder_start_token_id": 2,
}
DISTILBERT = {
    **{"vocab_size": VOCABULARY, "pad_token_id": PAD, "dim": 8, "n_layers": 2, "n_heads": 2},
    **{"hidden_dim": 12, "max_position_embeddings": LENGTH, "num_labels": 3},
    **{"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
}
VIT = {
    **NO_DROPOUT,
    **{"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 12, "image_size": 8, "patch_size": 4, "num_labels": 3},
}

MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, next_tokens, "embedding layer_norm"),
    "bert": ("BertForSequenceClassification", "BertConfig", BERT, classes, "embedding linear"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, next_tokens, "embedding linear"),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, pairs, "embedding linear"),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART, pairs, "embedding linear"),
    "distilbert": (
        *("DistilBertForSequenceClassification", "DistilBertConfig", DISTILBERT, classes),
        "embedding linear layer_norm",
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT, pictures, "conv linear layer_norm"),
}


def case(name, attention):
    model, config, options, batch, rules = MODELS[name]
    return Case(
        f"{name}-{attention}",
        of(model, config, attention, **options),
        batch,
        shifted_loss if batch is next_tokens else None,
        f"{rules} attention" if attention == "sdpa" and name != "t5" else rules,
        sizes=((2, 3), (3, 1)),
        # Norms of Llama and T5 and the eager softmaxes of Llama and ViT are float32 always.
        rtol=1e-5 if name in ("llama", "t5") or (name, attention) == ("vit", "eager") else 1e-10,
        # All but ViT look at the values of the mask.
        slow=attention == "eager" and name not in ("bert", "llama", "vit"),
    )


CASES = [case(name, attention) for name in MODELS for attention in ("sdpa", "eager")]
