"""A small text encoder, and words that tell the products of the tests apart."""

TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 64}
WORDS = [f"{colour} {thing}" for colour in ("red", "blue", "green") for thing in ("mug", "shoe", "hat", "dress")]
