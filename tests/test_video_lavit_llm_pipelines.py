"""Video-LaVIT's processor and its pipelines of generation and understanding, and their bad input."""

import json

import numpy as np
import pytest
import torch
from model_cases import video_lavit_llm as tiny
from PIL import Image
from python_process import run_python
from torch.nn.utils.rnn import pad_sequence
from video_lavit_llm_runs import BOI, BOM, EOI, IMAGE, VIDEO, VISUAL, call, video_file_fixture, writer_fixture  # noqa: F401

from cinetok import VideoLavitPipeline, VideoLavitProcessor, VideoLavitUnderstandingPipeline
from cinetok.modeling.video_lavit.processing_video_lavit import StopAtLiteral


@pytest.fixture(scope="module")
def processor():
    return tiny.processor()


# ----------------------------------------------------------------------------------------------------------- processor

PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\nwhat is it? ASSISTANT:"
)


def _messages(*content):
    return [{"role": "user", "content": list(content)}]


def test_chat_format(processor):
    image, text = {"type": "image", "image": tiny.picture()}, {"type": "text", "text": "what is it?"}
    turns = _messages(image, text)
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == PROMPT
    turns += [{"role": "assistant", "content": "a cat"}, {"role": "user", "content": "sure?"}]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
        PROMPT + " a cat \\n </s>USER: sure? ASSISTANT:"
    )
    system = [{"role": "system", "content": "Be brief."}, *_messages({"type": "video"}, text)]
    assert processor.apply_chat_template(system) == "Be brief. USER: <video>\nwhat is it? "
    with pytest.raises(Exception, match="alternate"):
        processor.apply_chat_template([{"role": "assistant", "content": "a"}])
    with pytest.raises(Exception, match="text, image or video"):
        processor.apply_chat_template(_messages({"type": "audio"}))


def test_pieces_between_placeholders_are_tokenised_on_their_own(processor):
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tiny.sentencepiece_model())
    encoded = processor(text=PROMPT, images=tiny.picture())
    before, after = PROMPT.split("<image>")
    expected = [1, *pieces.EncodeAsIds(before), IMAGE, *pieces.EncodeAsIds(after)]
    assert encoded["input_ids"].tolist() == [expected]
    assert encoded["pixel_values"].shape == (1, 3, 42, 42)
    assert processor.encode_prompt("a red ball") == pieces.EncodeAsIds("a red ball")
    # Every piece between special ids begins a text of its own.
    assert processor.tokenizer("a </s>user", add_special_tokens=False)["input_ids"] == [
        *pieces.EncodeAsIds("a "),
        2,
        *pieces.EncodeAsIds("user"),
    ]


TEXTS = [
    "a red ball",
    "  two  spaces, three   spaces",
    " lead",
    "\nnew\n\nline ",
    "naïve 日本 🎬",
    "x\ty",
    "",
    "a </s>user: b",
]


def test_ids_survive_save_and_load_in_a_fresh_process(processor, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tiny.sentencepiece_model())
    ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert ids[:-1] == [pieces.EncodeAsIds(text) for text in TEXTS[:-1]]
    tiny.processor(max_clips=3, image_mean=[0.5, 0.5, 0.5]).save_pretrained(tmp_path)
    code = """
    import json, sys
    from cinetok import VideoLavitProcessor
    p = VideoLavitProcessor.from_pretrained(sys.argv[1])
    ids = [p.tokenizer(t, add_special_tokens=False)["input_ids"] for t in json.loads(sys.argv[2])]
    chat = p.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    print(json.dumps([ids, p.max_clips, p.image_mean, p.motion_width, p.image_token_id, chat]))
    """
    result = json.loads(run_python(code, tmp_path, json.dumps(TEXTS)))
    assert result[0] == ids
    assert result[1:5] == [3, [0.5, 0.5, 0.5], tiny.MAP_WIDTH, IMAGE] and result[5].endswith("USER: hi ASSISTANT:")


def test_training_inputs_learn_the_answers_only(processor):
    conversation = [
        *_messages({"type": "image", "image": tiny.picture()}, {"type": "text", "text": "what is it?"}),
        {"role": "assistant", "content": "a blue cat."},
        {"role": "user", "content": "and the ball?"},
        {"role": "assistant", "content": "red"},
    ]
    batch = processor.training_inputs([conversation, conversation[:2]])
    tokenizer = processor.tokenizer
    learned = [tokenizer.decode([i for i in row.tolist() if i != -100]) for row in batch["labels"]]
    assert [text.strip() for text in learned] == ["a blue cat. \\n </s> red \\n </s>", "a blue cat. \\n </s>"]
    assert ((batch["labels"] == -100) | (batch["labels"] == batch["input_ids"])).all()
    assert batch["attention_mask"][1, -1] == 0 and len(batch["pixel_values"]) == 2
    with pytest.raises(ValueError, match="ends with"):
        processor.training_inputs([conversation[:1]])


def test_videos_become_key_frames_and_motion(processor, video_file):
    chat = [_messages({"type": "video", "path": str(video_file)}, {"type": "text", "text": "what moves?"})]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs={"max_clips": 1}
    )
    assert inputs["pixel_values_videos"].shape == (1, 3, 42, 42) and inputs["num_clips"].tolist() == [1]
    assert inputs["motion_values"].shape == (1, 2, tiny.NUM_FRAMES, tiny.MAP_HEIGHT, tiny.MAP_WIDTH)
    assert inputs["motion_values"].abs().max() > 0
    assert (inputs["input_ids"] == VIDEO).sum() == 1


def test_bad_inputs_of_the_processor_raise(processor, video_file, tmp_path):
    text_file = tmp_path / "notes.txt"
    text_file.write_text("no video")
    for options, error, message in (
        ({}, ValueError, "text is needed"),
        ({"text": 3}, TypeError, "not iterable|string"),
        ({"text": ["a", 3]}, TypeError, "strings"),
        ({"text": "<image> a"}, ValueError, r"holds \[1\] <image>"),
        ({"text": "a", "images": tiny.picture()}, ValueError, r"\[1\] image"),
        ({"text": ["<image>", "b"], "images": [[], [tiny.picture()]]}, ValueError, "placeholder"),
        ({"text": "<video>", "videos": tiny.picture()}, TypeError, "video file"),
        ({"text": "<image>", "images": str(video_file)}, ValueError, "not a readable image"),
        ({"text": "<image>", "images": np.zeros((4, 8, 8, 3), np.uint8)}, ValueError, "image array"),
        ({"text": "<video>", "videos": str(text_file)}, ValueError, "not a readable video"),
        ({"text": "<video>", "videos": str(tmp_path / "none.mp4")}, ValueError, "no such file"),
        ({"text": "a", "padding_side": "top"}, ValueError, "left"),
    ):
        with pytest.raises(error, match=message):
            processor(**options)
    with pytest.raises(ValueError, match="choose one outside"):
        VideoLavitProcessor(processor.tokenizer, image_token_id=5)
    with pytest.raises(TypeError, match="string"):
        processor.encode_prompt(5)


def test_answers_end_at_the_literal_stop_string(processor):
    tokenizer = processor.tokenizer
    ids = tokenizer("a red ball, and a cat \\n </s> more", add_special_tokens=False)["input_ids"]
    assert processor.decode_answer([*ids, 450, 9000]) == "a red ball, and a cat"
    assert processor.decode_answer(ids, short=True) == "a red ball"
    assert processor.decode_answer(tokenizer("\nyes! sure", add_special_tokens=False)["input_ids"], short=True) == "yes"
    assert processor.post_process_answers(torch.tensor([ids, ids])) == ["a red ball, and a cat"] * 2

    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a cat \\n", "a cat sits")]
    rows = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    assert StopAtLiteral(tokenizer)(rows, None).tolist() == [True, False]
    assert StopAtLiteral(tokenizer, prompt_length=rows.shape[1])(rows, None).tolist() == [False, False]
    # The stop string also works with transformers' own argument.
    from transformers.generation import StopStringCriteria

    assert StopStringCriteria(tokenizer, ["\\n"])(rows[:, : (rows[0] != 0).sum()], None).tolist()[0]


# ----------------------------------------------------------------------------------------------------------- pipelines


@pytest.fixture(scope="module")
def pipeline():
    return tiny.generation_pipeline()


def test_text_to_video_and_output_types(pipeline):
    tensor = call(pipeline, 2)
    assert tensor.frames.shape == (2, 8, 3, 16, 24) and tensor.images is None and len(tensor.keyframes) == 1
    assert tensor.frames.min() >= 0 and tensor.frames.max() <= 1
    array = call(pipeline, 2, output_type="np").frames
    assert np.allclose(array, tensor.frames.permute(0, 1, 3, 4, 2).numpy(), atol=1e-6)
    pictures = call(pipeline, 2, output_type="pil", return_dict=False)[0]
    assert isinstance(pictures[1][7], Image.Image) and pictures[1][7].size == (24, 16)
    ids = tensor.token_ids[0].tolist()
    prompt = pipeline.processor.encode_prompt("a red ball rolls")
    assert ids[: len(prompt) + 1] == [*prompt, BOI] and BOM in ids


def test_text_matters_and_seeds_repeat(pipeline):
    first, second = call(pipeline).frames, call(pipeline).frames
    assert torch.equal(first, second)
    assert (call(pipeline, prompt="a blue cat sits").frames - first).abs().max() > 1e-3
    assert (call(pipeline, generator=torch.Generator().manual_seed(5)).frames - first).abs().max() > 1e-3
    changed = call(pipeline, guidance_scale=2.0, negative_prompt="the mat")
    assert (changed.frames - first).abs().max() > 1e-4


def test_text_to_image(pipeline):
    output = call(pipeline, 2, modality="image", height=24, width=16)
    assert output.images.shape == (2, 3, 24, 16) and output.frames is None and output.keyframes is None
    assert all(BOM not in ids for ids in output.token_ids)
    with_image = call(pipeline, modality="image", image=tiny.picture(), image_token_guidance_scale=5.0)
    other_image = call(pipeline, modality="image", image=tiny.picture(1), image_token_guidance_scale=5.0)
    assert (with_image.images - other_image.images).abs().max() > 1e-3


def test_only_a_video_s_prompt_has_marks_around_its_images(pipeline):
    prompt = pipeline.processor.encode_prompt("a red ball rolls")
    for modality in ("image", "video"):
        ids = call(pipeline, modality=modality, image=tiny.picture()).token_ids[0].tolist()
        assert ids[: len(prompt)] == prompt
        written = ids[len(prompt) :]
        if modality == "video":
            assert written[0] == BOI and written[written.index(EOI) + 1] == BOM
        else:  # bare codes, then the mark that opens the image to write
            codes = written[: written.index(BOI)]
            assert codes and all(VISUAL <= token < BOM for token in codes)


def test_image_to_video_uses_the_image_as_key_frame(pipeline):
    image = tiny.picture(size=(24, 16))
    output = call(pipeline, image=image)
    assert np.array_equal(np.asarray(output.keyframes[0][0]), np.asarray(image))
    ids = output.token_ids[0].tolist()
    assert ids.count(BOI) == ids.count(EOI) == 1  # its codes were read, none were written
    assert (call(pipeline, image=tiny.picture(1, size=(24, 16))).frames - output.frames).abs().max() > 1e-3
    assert (call(pipeline, prompt="a blue cat", image=image).frames - output.frames).abs().max() > 1e-4
    alone = call(pipeline, prompt=None, image=[image])
    assert alone.frames.shape == output.frames.shape
    interleaved = call(pipeline, prompt=[["a red ball", tiny.picture(2), "becomes", image]])
    assert np.array_equal(np.asarray(interleaved.keyframes[0][0]), np.asarray(image))
    assert interleaved.token_ids[0].tolist().count(BOI) == 2


def test_long_videos_continue_from_everything_so_far(pipeline):
    output = call(pipeline, 2, num_clips=3)
    assert output.frames.shape == (2, 8 + 7 + 7, 3, 16, 24) and len(output.keyframes) == 3
    assert output.token_ids[0].tolist().count(BOI) >= 3  # the mark itself is not excluded when codes are drawn
    single = call(pipeline, 2)
    assert torch.equal(output.token_ids[0][: len(single.token_ids[0])], single.token_ids[0])
    assert torch.allclose(output.frames[:, :8], single.frames, atol=1e-5)
    assert call(pipeline, num_clips=2, drop_repeated_frames=False).frames.shape[1] == 16
    linked = call(pipeline, num_clips=2, inverse_rate=0.5).keyframes[1][0]
    fresh = call(pipeline, num_clips=2, inverse_rate=0.0).keyframes[1][0]
    assert not np.array_equal(np.asarray(linked), np.asarray(fresh))


def test_callbacks_see_and_change_every_loop(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tuple(tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])}

    changed = call(pipeline, callback_on_step_end=callback).frames
    assert seen == [(1, 4, 8, 8)] * 2 + [(1, 8, 4, 8, 12)] * 2
    assert (changed - call(pipeline).frames).abs().max() > 1e-3


def test_another_pipeline_can_draw_the_key_frame(tmp_path):
    pipeline = tiny.generation_pipeline(text_to_image=tiny.text_to_image_pipeline())
    output = call(pipeline, 2, use_text_to_image=True)
    plain = call(pipeline, 2)
    assert output.token_ids[0].tolist().count(BOI) == 1
    assert (output.frames - plain.frames).abs().max() > 1e-3
    pipeline.save_pretrained(tmp_path)
    again = VideoLavitPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(call(again, 2, use_text_to_image=True).frames, output.frames)


def test_bad_inputs_of_the_pipeline_raise(pipeline, tmp_path):
    image = tiny.picture()
    for options, error, message in (
        ({"prompt": None}, ValueError, "a prompt, an image"),
        ({"prompt": []}, ValueError, "every prompt"),
        ({"prompt": [[]]}, ValueError, "every prompt"),
        ({"prompt": 5}, TypeError, "prompt must be"),
        ({"prompt": [5]}, TypeError, "an image is"),
        ({"modality": "audio"}, ValueError, "modality"),
        ({"output_type": "gif"}, ValueError, "output_type"),
        ({"num_clips": 0}, ValueError, "num_clips"),
        ({"num_clips": 2, "modality": "image"}, ValueError, "num_clips"),
        ({"height": 15}, ValueError, "multiples"),
        ({"keyframe_width": 18}, ValueError, "multiples"),
        ({"inverse_rate": 1.0}, ValueError, "inverse_rate"),
        ({"generator": [torch.Generator()] * 3}, ValueError, "3 generators"),
        ({"generator": 5}, TypeError, "torch.Generator or a list of them, not int"),
        ({"image": [image, image]}, ValueError, "2 images for 1"),
        ({"prompt": ["a", ["b", image]]}, ValueError, "or none"),
        ({"use_text_to_image": True}, ValueError, "component text_to_image"),
        ({"use_text_to_image": True, "modality": "image"}, ValueError, "call that pipeline itself"),
        ({"image": str(tmp_path / "none.png")}, ValueError, "not a readable image"),
        ({"image": torch.zeros(8, 3, 16, 16)}, ValueError, "image tensor"),
        ({"negative_prompt": ["a", "b"]}, ValueError, "2 negative"),
        ({"max_image_tokens": 3000}, ValueError, "more than the language model's"),
    ):
        with pytest.raises(error, match=message):
            call(pipeline, **{"generator": None, **options})
            pytest.fail(f"accepted: {options}")


@pytest.fixture(scope="module")
def answering():
    return tiny.understanding_pipeline()


def _ask(pipeline, question="what is in the picture?", **options):
    generator = torch.Generator().manual_seed(0)
    return pipeline(question, **{"min_new_tokens": 12, "max_new_tokens": 12, "generator": generator, **options})


def test_answers_depend_on_question_image_and_video(answering, video_file):
    def ids(output):
        return output.token_ids[0].tolist()

    image = _ask(answering, image=tiny.picture())
    assert len(ids(image)) == 12 and all(i < 400 for i in ids(image)) and isinstance(image.answers[0], str)
    assert ids(image) == ids(_ask(answering, image=tiny.picture()))
    assert ids(image) != ids(_ask(answering, image=tiny.picture(3)))
    assert ids(image) != ids(_ask(answering, "a cat", image=tiny.picture()))
    assert ids(image) != ids(_ask(answering))
    video = _ask(answering, video=str(video_file))
    assert ids(video) != ids(image) and ids(video) != ids(_ask(answering, video=str(video_file), end=0.4))
    history = [
        {"role": "user", "content": "what is it?"},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "what is in the picture?"},
    ]
    assert ids(_ask(answering, history, image=tiny.picture())) != ids(image)
    assert ids(_ask(answering, image=tiny.picture(), system_prompt="the mat")) != ids(image)


def test_batches_of_questions_equal_single_questions(answering, video_file):
    questions = ["what is in the picture?", "a cat", "the red ball rolls to the left"]
    images, videos = [tiny.picture(), None, None], [None, str(video_file), None]
    options = {"min_new_tokens": 6, "max_new_tokens": 6}
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = answering(questions, image=images, video=videos, generator=generators, **options)
    for row in range(3):
        alone = answering(
            questions[row],
            image=images[row],
            video=videos[row],
            generator=torch.Generator().manual_seed(row),
            **options,
        )
        assert together.answers[row] == alone.answers[0]
        assert together.token_ids[row].tolist() == alone.token_ids[0].tolist()


def test_sampled_answers_repeat_with_a_generator_and_leave_the_global_one_alone(answering):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = _ask(answering, image=tiny.picture(), do_sample=True)
    assert torch.equal(torch.rand(1), expected)
    assert first.answers == _ask(answering, image=tiny.picture(), do_sample=True).answers
    other = _ask(answering, image=tiny.picture(), do_sample=True, generator=torch.Generator().manual_seed(9))
    assert first.token_ids[0].tolist() != other.token_ids[0].tolist()


def test_bad_inputs_of_the_understanding_pipeline_raise(answering, processor, writer, video_file):
    for options, message in (
        ({"question": []}, "no question"),
        ({"question": ["a", "b"], "image": [tiny.picture()]}, "1 entries of image"),
        ({"generator": [torch.Generator()] * 2}, "2 generators"),
        ({"image": str(video_file)}, "not a readable image"),
        ({"question": "is this <image> it?"}, "placeholder"),
    ):
        with pytest.raises(ValueError, match=message):
            answering(**{"question": "a", **options})
    with pytest.raises(TypeError, match="video file"):
        answering("a", video=tiny.picture())
    with pytest.raises(TypeError, match="not int"):
        answering("a", generator=5)
    with pytest.raises(ValueError, match="no tokenizers"):
        VideoLavitUnderstandingPipeline(model=writer, processor=processor)("a")
