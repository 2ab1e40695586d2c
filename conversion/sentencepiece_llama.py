"""Turns LLaMA's `tokenizer.model` (sentencepiece BPE) into a tokenizer of transformers with exactly its ids.

transformers' own conversion orders the merges by piece id. LLaMA's pieces of several spaces have low ids but the lowest
scores, so "two  spaces" would get other ids than sentencepiece gives. Here merges are ordered by score, every piece
of text between special tokens gets its own leading space (what transformers 4 called `legacy`), and the result is
checked against sentencepiece. Saved and loaded again it is the same, because all of this lies in `tokenizer.json`.
"""

from pathlib import Path

from ..errors import CheckpointError

_PROBES = (
    "A chat between a curious user and an artificial intelligence assistant.",
    " lead and trail ",
    "two  spaces,   three",
    "\nWhat is   it?\n\n",
    "x = [1,  2]\n    def f():\n        pass\t# tab",
    "literal \\n at the end \\n ",
    "日本語 naïve café 🎬 Ωmega",
    "it's 3.14159 or 10,000!",
)


def llama_tokenizer_from_sentencepiece(path, **special_tokens):
    """A `PreTrainedTokenizerFast` with the ids of a sentencepiece BPE model.

    Args:
        path: the `tokenizer.model` file.
        special_tokens: further keyword arguments of the tokenizer, for example `pad_token="<unk>"`.

    Raises:
        CheckpointError: the file is missing, damaged or no BPE model, or a probe text gets other ids.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; it is the sentencepiece model of the text tokenizer")
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.Load(str(path))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a readable sentencepiece model ({error})") from error
    pieces = [model.IdToPiece(i) for i in range(model.GetPieceSize())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(
        BPE(
            vocab,
            _merges(pieces, [model.GetScore(i) for i in range(len(pieces))], vocab),
            unk_token=pieces[model.unk_id()],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    marks = [piece for i, piece in enumerate(pieces) if model.IsUnknown(i) or model.IsControl(i)]
    backend.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=pieces[model.unk_id()],
        bos_token=pieces[model.bos_id()],
        eos_token=pieces[model.eos_id()],
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )
    for probe in _PROBES:
        ours, theirs = tokenizer(probe, add_special_tokens=False)["input_ids"], model.EncodeAsIds(probe)
        if ours != theirs:
            raise CheckpointError(
                f"{path}: is no BPE model of LLaMA's kind: {probe!r} should become {theirs}, not {ours}"
            )
    return tokenizer


def _merges(pieces, scores, vocab):
    """All ways to join two pieces into a third, best score first, as sentencepiece prefers them."""
    merges = []
    for piece in sorted(vocab, key=lambda p: -scores[vocab[p]]):
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += sorted(
            (p for p in pairs if p[0] in vocab and p[1] in vocab), key=lambda p: (vocab[p[0]], vocab[p[1]])
        )
    return merges
