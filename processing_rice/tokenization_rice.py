"""A subword tokenizer for product titles and ASR, trained on a list of strings.

`train_tokenizer` learns a SentencePiece unigram vocabulary (Kudo, 2018, "Subword Regularization") on mixed Chinese and
English text and returns it as a `PreTrainedTokenizerFast`. A loaded checkpoint needs only `tokenizers`; sentencepiece
is imported only to train a vocabulary.

Text is normalised only in its whitespace: runs become one space, and leading and trailing whitespace is removed. The
character U+2581, SentencePiece's mark of word boundaries, counts as a space. Characters outside the vocabulary are
encoded as bytes, so decoding returns the encoded text. With `fold`, case, the width of full-width characters and the
punctuation of sentences are removed too, so that "Red mug." in a title or from a speech model equals "red mug".
"""

import copy
import io
from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD_TOKEN, UNK_TOKEN, BOS_TOKEN, EOS_TOKEN = SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>")
SPACE_MARK = "\u2581"
PRINTABLE_ASCII = "".join(chr(code) for code in range(0x21, 0x7F))
NUM_FIXED_PIECES = len(SPECIAL_TOKENS) + 256 + len(PRINTABLE_ASCII) + 1
MIN_VOCAB_SIZE = 400
QUIET_UP_TO = 20_000
# Punctuation of sentences, not that of numbers, times and names such as 1.5, 10:30 and node.js.
_PUNCTUATION = r"[.,!?;:]+(?![0-9a-z])|[\u3001\u3002]+"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 2000, model_max_length: int = 64, fold: bool = False
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on `texts`. The same texts in the same order give the same tokenizer.

    Args:
        texts: Titles and ASR transcripts; held in memory during training. Empty strings are allowed.
        vocab_size: Upper bound of the vocabulary, at least 400. Of these, 355 entries are fixed (4 special tokens, 256
            bytes, printable ASCII, the word boundary). A small corpus gives a smaller vocabulary.
        model_max_length: Maximum length in tokens with `truncation=True`, including `<s>` and `</s>`.
        fold: Ignore case, character width and the punctuation of sentences, in training and in use.

    Returns:
        A tokenizer that writes `<s> ... </s>`, pads on the right with id 0 and returns `input_ids` and
        `attention_mask`, each (batch_size, sequence_length).

    Raises:
        TypeError: if an entry of `texts` is not a string.
        ValueError: if `vocab_size` or `model_max_length` is too small, if `texts` holds no visible character, or if an
            entry is not valid Unicode.
        ImportError: if sentencepiece is not installed.
    """
    model_proto = train_sentencepiece(texts, vocab_size=vocab_size, fold=fold)
    tokenizer = wrap_sentencepiece(model_proto, model_max_length=model_max_length)
    return fold_texts(tokenizer) if fold else tokenizer


def fold_texts(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """
    Returns a copy of a tokenizer of `train_tokenizer` that reads texts as with `fold`. Its ids keep their meaning. A
    model trained on lower-case texts without punctuation, as many speech recognisers write them, can then read texts
    that have both.

    Raises:
        ValueError: for another tokenizer, whose own rules would be lost.
    """
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    # Both of its normalizers end with the same rules for whitespace.
    if not repr(normalizer).endswith(repr(_normalizer(fold=False)).partition("[")[2]):
        raise ValueError(
            f"The {type(tokenizer).__name__} is not one of `train_tokenizer`; train one with `fold=True`."
        )
    folding = copy.deepcopy(tokenizer)
    folding.backend_tokenizer.normalizer = _normalizer(fold=True)
    return folding


def train_sentencepiece(texts: Iterable[str], vocab_size: int = 2000, fold: bool = False) -> bytes:
    """Train the unigram vocabulary of `train_tokenizer`, with the same arguments and errors.

    Returns:
        The serialised SentencePiece model. It gives the same ids as the wrapped tokenizer for text whose whitespace is
        already normalised, except for exact ties between segmentations (`7` `77` and `77` `7`): there the order of the
        pieces may differ, because the two sum scores in different precision.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size}; use at least {MIN_VOCAB_SIZE}.")
    sentences = _clean_sentences(texts, _normalizer(fold))
    sentences = _keep_frequent_characters(sentences, max_characters=(vocab_size - NUM_FIXED_PIECES) // 2)
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError("Training a tokenizer needs sentencepiece: pip install sentencepiece.") from error

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars=PRINTABLE_ASCII,
        normalization_rule_name="identity",
        # The default of 4192 bytes would silently leave out long transcripts; values below 10 are refused.
        max_sentence_length=max(10, *(len(sentence.encode()) + 1 for sentence in sentences)),
        # The training sums floats per thread, so its last digits would depend on the number of threads.
        num_threads=1,
        # For long training, SentencePiece's own log shows the progress.
        minloglevel=0 if len(sentences) > QUIET_UP_TO else 2,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        pad_piece=PAD_TOKEN,
        unk_piece=UNK_TOKEN,
        bos_piece=BOS_TOKEN,
        eos_piece=EOS_TOKEN,
    )
    return model.getvalue()


def wrap_sentencepiece(model_proto: bytes, model_max_length: int = 64) -> PreTrainedTokenizerFast:
    """Wrap a model of `train_sentencepiece` as a `PreTrainedTokenizerFast` with the same ids.

    Raises:
        ValueError: if `model_max_length` leaves no room for text.
        ImportError: if sentencepiece is not installed.
    """
    if model_max_length < 3:
        raise ValueError(
            f"model_max_length is {model_max_length}; use at least 3 ({BOS_TOKEN}, a token, {EOS_TOKEN})."
        )
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError("Reading a SentencePiece model needs sentencepiece: pip install sentencepiece.") from error

    sp = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
    tokenizer = Tokenizer(models.Unigram(_unigram_vocab(sp), unk_id=sp.unk_id(), byte_fallback=True))
    tokenizer.normalizer = _normalizer(fold=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE_MARK, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A {EOS_TOKEN}",
        pair=f"{BOS_TOKEN} $A {EOS_TOKEN} $B:1 {EOS_TOKEN}:1",
        special_tokens=[(BOS_TOKEN, sp.bos_id()), (EOS_TOKEN, sp.eos_id())],
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        unk_token=UNK_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="right",
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        # Titles are untrusted input: a literal "</s>" in a title is text, not the end of the sequence.
        split_special_tokens=True,
    )


def _normalizer(fold: bool) -> normalizers.Normalizer:
    folding = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(_PUNCTUATION), " ")]
    # Both libraries use U+2581 for a space internally, but treat doubled ones differently.
    spaces = [normalizers.Replace(Regex(rf"[\s{SPACE_MARK}]+"), " "), normalizers.Strip()]
    return normalizers.Sequence([*folding, *spaces] if fold else spaces)


def _clean_sentences(texts: Iterable[str], normalizer: normalizers.Normalizer) -> list[str]:
    if isinstance(texts, str):
        raise TypeError("texts is a single string; pass a list of strings.")
    sentences = []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}] is a {type(text).__name__}; every text must be a string.")
        try:
            sentence = normalizer.normalize_str(text)
        except UnicodeEncodeError as error:
            raise ValueError(f"texts[{index}] is not valid Unicode ({error.reason}); repair or remove it.") from error
        if sentence:
            sentences.append(sentence)
    if not sentences:
        raise ValueError("texts holds no visible character; a tokenizer needs at least one non-empty text.")
    return sentences


def _keep_frequent_characters(sentences: list[str], max_characters: int) -> list[str]:
    """Replace the rarest non-ASCII characters by spaces; the tokenizer will encode them as bytes.

    SentencePiece reserves a piece for every character it covers, so thousands of Chinese characters would leave no
    room for words. Its own setting `character_coverage` is a share of the text, not a number of characters.
    """
    counts = Counter(character for sentence in sentences for character in sentence)
    beyond_ascii = (character for character in counts if not character.isascii())
    frequent = sorted(beyond_ascii, key=lambda character: (-counts[character], character))[:max_characters]
    blank = {ord(character): " " for character in counts.keys() - set(frequent) - set(PRINTABLE_ASCII)}
    kept = [" ".join(sentence.translate(blank).split()) for sentence in sentences]
    return [sentence for sentence in kept if sentence] or [PRINTABLE_ASCII]


def _unigram_vocab(sp) -> list[tuple[str, float]]:
    """Pieces and scores of a SentencePiece model, in id order.

    SentencePiece never matches its special and byte pieces in a text, but `Unigram` does, and their stored score of 0
    would be the best. They therefore get a score below that of the longest of them spelled out in characters.
    """
    ids = range(sp.get_piece_size())
    pieces = [sp.id_to_piece(i) for i in ids]
    is_text = [not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i)) for i in ids]
    lowest = min(sp.get_score(i) for i in ids if is_text[i])
    spelled_out = lowest * max(len(piece) + 1 for piece, text in zip(pieces, is_text) if not text)
    return [(pieces[i], sp.get_score(i) if is_text[i] else spelled_out) for i in ids]
