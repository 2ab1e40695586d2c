"""Divot-LLM's prompts and its pipelines of comprehension, video and stories, and their bad input."""

import numpy as np
import pytest
import torch
from model_cases import divot as parts
from model_cases import divot_llm as cases
from python_process import run_python

import cinetok
from cinetok import DivotConfig, DivotForCausalLM, DivotProcessor
from cinetok.modeling.divot.processing_divot import build_divot_tokenizer

SIZE, DIM = cases.FEATURES, cases.FEATURE_DIM


# ---- processor and prompts ---------------------------------------------------------------------------------------


def test_chat_template():
    processor = cases.processor()
    user = {"role": "user", "content": [{"type": "video", "video": parts.video(0)}, {"type": "text", "text": "What?"}]}
    turns = [user, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Where?"}]
    assert (
        processor.apply_chat_template([user])
        == processor.comprehension_prompt("What?")
        == "[INST] <video>What? [/INST]\n"
    )
    expected = "[INST] <video>What? [/INST]\nA cat.\n[INST] Where? [/INST]\n"
    assert processor.apply_chat_template(turns) == expected
    answered = [*turns, {"role": "assistant", "content": [{"type": "text", "text": "Here."}, {"type": "image"}]}]
    assert processor.apply_chat_template(answered) == expected + "Here.<image></s>"
    assert processor.apply_chat_template(answered, continue_final_message=True) == expected + "Here.<image>"
    assert processor.apply_chat_template([{"role": "user", "content": "Generate a video of rain"}]) == (
        processor.generation_prompt("rain")
    )
    assert processor.story_prompt("Generate a story.") == "[INST] Generate a story. [/INST]\n"
    batch = processor.apply_chat_template([turns, turns[-1:]], tokenize=True)
    assert batch["pixel_values_videos"].shape == (2, 5, 3, 32, 32) and batch["num_clips"].tolist() == [2]
    assert batch["attention_mask"][1, 0] == 0
    for wrong, message in (
        (turns[1:], "turns alternate"),
        ([{"role": "system", "content": "x"}], "turns alternate"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "not audio"),
        ([{"role": "user", "content": [{"type": "text"}]}], 'lacks its "text"'),
        ([{"role": "user"}], "content"),
        ([{"content": "x"}], "role"),
        ([], "empty"),
        ([[]], "empty"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(wrong)
    with pytest.raises(ValueError, match='lacks its "video"'):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=True)


def test_videos_and_images_keep_their_order():
    processor = cases.processor()
    image = np.full((20, 20, 3), 255, np.uint8)
    inputs = processor(
        ["[INST] <image>a<video>b [/INST]\n", "[INST] <video>c [/INST]\n"],
        videos=[parts.video(0, num_frames=20), parts.video(1, num_frames=8)],
        images=[image],
    )
    assert inputs["num_clips"].tolist() == [1, 2, 1]
    assert (inputs["pixel_values_videos"][0] == 1).all() and not (inputs["pixel_values_videos"][1] == 1).all()
    for text, given, message in (
        ("[INST] <video>a [/INST]\n", {}, "1 <video>, but 0 videos"),
        ("[INST] a [/INST]\n", {"videos": parts.video(0)}, "0 <video>, but 1 videos"),
        ("[INST] <image>a [/INST]\n", {"videos": parts.video(0)}, "<video>|<image>"),
        ("<video>", {"num_clips": [1, 1]}, "does not fit 1"),
        ("<video>", {"num_clips": [0]}, "does not fit 1"),
        ("<video>", {"num_clips": [1], "videos": parts.video(0)}, "not both"),
        (None, {}, "give text"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(text, **given)


def test_text_is_cleaned():
    processor = cases.processor()
    ids = processor.tokenizer("ab cd", add_special_tokens=False)["input_ids"]
    tags = list(processor.token_ids()["query_token_ids"][:2]) + [processor.token_ids()["video_start_token_id"]]
    assert processor.post_process_text([[*ids, *tags, 2, 0]]) == ["ab cd"]


def test_a_tokenizer_that_does_not_match():
    processor = cases.processor()
    with pytest.raises(ValueError, match="tokens, the model"):
        processor.check_model(DivotConfig())
    config = cases.llm().config
    config.query_token_ids = config.query_token_ids[::-1]
    with pytest.raises(ValueError, match="disagree on query_token_ids"):
        processor.check_model(config)
    with pytest.raises(ValueError, match="disagree"):
        cinetok.DivotComprehensionPipeline(processor, parts.tokenizer(), DivotForCausalLM(config))
    plain = build_divot_tokenizer(cases._tokenizer_file(), num_frame_tokens=2)
    with pytest.raises(ValueError, match="lacks <frame_00002>"):
        DivotProcessor(plain, num_query_tokens=8)


# ---- pipelines ---------------------------------------------------------------------------------------------------

_FRESH = """
import sys, torch, cinetok
from diffusers import DiffusionPipeline
from model_cases import divot
_, name, folder, class_name, result = sys.argv
case = {case.name: case for case in divot.PIPELINES}[name]
pipe = DiffusionPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
assert type(pipe).__name__ == class_name
torch.save(case.result(pipe(**case.inputs(2))), result)
"""


@pytest.mark.parametrize("case", cases.PIPELINES, ids=lambda case: case.name)
def test_pipeline_saved_loaded_in_a_fresh_process_and_in_batches(case, tmp_path):
    pipe = case.build()
    both = case.result(pipe(**case.inputs(2)))
    single = case.result(pipe(**case.inputs(1)))
    if isinstance(both, list):
        assert single[0] == both[0] and all(both) and both[0] != both[1]
    else:
        assert torch.allclose(single[0], both[0], atol=1e-4) and (both[0] - both[1]).abs().max() > 1e-2
    pipe.save_pretrained(tmp_path / "saved")
    run_python(_FRESH, case.name, tmp_path / "saved", type(pipe).__name__, tmp_path / "result.pt")
    loaded = torch.load(tmp_path / "result.pt", weights_only=True)
    assert loaded == both if isinstance(both, list) else torch.equal(loaded, both)


def test_comprehension_depends_on_everything():
    pipe = cases.comprehension()
    options = {"max_new_tokens": 12, "do_sample": False}
    clip = parts.video(0, num_frames=40)
    base = pipe("What is it?", clip, **options)
    assert base.num_clips == [3] and base.features.shape == (3, SIZE, DIM) and len(base.texts[0]) > 5
    assert pipe("What is it?", clip, **options).texts == base.texts
    assert pipe("What is it?", 255 - clip, **options).texts != base.texts
    assert pipe("Who is it?", clip, **options).texts != base.texts
    assert pipe(["What is it?", "Who?"], clip, **options).texts[0] == base.texts[0]
    messages = [
        {"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": "What is it?"}]}
    ]
    assert pipe(messages=messages, **options).texts == base.texts
    features, num_clips = pipe.encode_video(clip)
    assert pipe("What is it?", features=features, num_clips=num_clips, **options).texts == base.texts
    assert "".join(pipe.stream("What is it?", clip, **options)) == base.texts[0]
    again = [*messages, {"role": "assistant", "content": base.texts[0]}, {"role": "user", "content": "And?"}]
    assert pipe(messages=again, features=features, num_clips=num_clips, **options).texts[0]
    still = pipe("What is it?", image=clip[0].numpy(), **options)
    assert still.num_clips == [1] and still.texts != base.texts
    assert pipe(video=clip, instruct=False, **options).texts != base.texts
    # A token that is not mapped: the features would be put in too few places.
    pipe.llm.config.query_token_ids = [*pipe.llm.config.query_token_ids[:-1], 5]
    with pytest.raises(ValueError, match="room for"):
        pipe("What is it?", clip, **options)


def test_bad_input_to_comprehension():
    pipe, clip = cases.comprehension(), parts.video(0)
    features = torch.zeros(1, SIZE, DIM)
    for arguments, message in (
        ({"question": "What?"}, "needs a video"),
        ({"video": clip}, "no question"),
        ({"question": "What?", "video": clip, "instruct": False}, "takes no question"),
        ({"question": "What?", "video": clip, "image": clip[0]}, "needs a video"),
        ({"question": "What?", "features": features}, "num_clips"),
        ({"question": "What?", "features": features, "num_clips": [2]}, "room for"),
        ({"question": "What?", "features": features[:, :-1], "num_clips": [1]}, "expected"),
        ({"question": ["a", "b"], "video": [clip] * 3}, "3 videos for 2 questions"),
        ({"messages": [], "question": None}, "empty"),
        ({"messages": [{"role": "user", "content": "a"}], "question": "b"}, "themselves"),
        ({"messages": [[]]}, "empty"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "user's turn"),
        ({"question": "Is <vid> it?", "video": clip}, "plain text, without <vid>"),
        ({"question": "Is <frame_00001> it?", "video": clip}, "plain text, without <frame_00001>"),
        ({"question": "Is <video> it?", "video": clip}, "plain text, without <video>"),
        ({"question": "What?", "video": clip, "video_fps": 0}, "video_fps"),
        ({"question": "What?", "video": clip[:0]}, "(?i)shape|frames"),
        ({"question": "What?", "video": clip.double() / 0}, "NaN|infinite"),
        ({"question": "What?", "video": clip, "temperature": 0}, "temperature"),
        ({"question": "What?", "video": clip, "top_p": 0}, "top_p"),
        ({"question": "What?", "video": clip, "max_new_tokens": 0}, "max_new_tokens"),
        ({"question": ["a", "b"], "video": clip, "generator": cases.generators(3)}, "3 generators for 2"),
        ({"question": ["a", "b"], "video": clip, "streamer": object()}, "one text at a time"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)
    with pytest.raises(ValueError, match="needs a video"):
        list(pipe.stream("What?"))


def test_text_to_video_depends_on_everything():
    pipe = cases.text_to_video()
    options = cases._video_inputs(1) | {"generator": None}

    def make(seed=0, **changes):
        return pipe(**(options | {"generator": torch.Generator().manual_seed(seed)} | changes))

    base = make()
    assert base.frames.shape == (1, 4, 3, 16, 16) and base.features.shape == (1, SIZE, DIM) and base.fps == 8.0
    assert base.frames.min() >= 0 and base.frames.max() <= 1
    assert torch.equal(make().frames, base.frames)
    for changes in ({"seed": 1}, {"prompt": "a cat"}, {"kind": "image"}, {"var_scale": 1.0}, {"guidance_scale": 1.0},
                    {"feature_sampling": "mean"}, {"guidance_rescale": 0.0}, {"fs": 20}):  # fmt: skip
        assert (make(**changes).frames - base.frames).abs().max() > 1e-4, changes
    two = make(num_videos_per_prompt=2)
    assert len(two.frames) == 2 and (two.frames[0] - two.frames[1]).abs().max() > 1e-3
    images = make(output_type="pil").frames
    assert len(images) == 1 and len(images[0]) == 4 and images[0][0].size == (16, 16)
    assert make(output_type="np").frames.shape == (1, 4, 16, 16, 3)
    seen = []
    make(callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(step))
    assert seen == [0, 1]
    frames, features, texts = make(return_dict=False)
    assert torch.equal(features, base.features) and texts == base.texts


def test_text_before_a_clip_and_a_missing_tag():
    pipe = cases.text_to_video()
    tag = pipe.processor.token_ids()["video_start_token_id"]
    rows = [[1, 7, 8], [1, 9]]
    opened, written = pipe.open_clips(rows, max_new_tokens=2, do_sample=False)
    assert [row[-1] for row in opened] == [tag, tag]
    assert [row[: len(start)] for row, start in zip(opened, rows)] == rows
    with torch.no_grad():  # the next token after anything is </s>
        hidden = pipe.llm.model(torch.tensor([[1, 7, 8]])).last_hidden_state[0, -1]
        pipe.llm.lm_head.weight.zero_()[2] = hidden
    opened, written = pipe.open_clips(rows[:1], max_new_tokens=5, do_sample=False, force=[False])
    assert opened == [None] and written == [[2]]
    opened, _ = pipe.open_clips(rows[:1], max_new_tokens=5, do_sample=False)
    assert opened == [[1, 7, 8, tag]]
    with torch.no_grad():
        pipe.llm.lm_head.weight.zero_()[tag] = hidden
    opened, written = pipe.open_clips(rows[:1], max_new_tokens=5, do_sample=False)
    assert opened == [[1, 7, 8, tag]] and written == [[tag]]


def test_stories_feed_clips_back():
    pipe = cases.story()
    calls, write = [], pipe.write_clips

    def spy(rows, features=None, **options):
        calls.append((len(rows[0]), None if features is None else len(features)))
        return write(rows, features, **options)

    pipe.write_clips = spy
    options = cases._story_inputs(1) | {"max_clips": 3, "min_clips": 3}
    result = pipe(**(options | {"generator": torch.Generator().manual_seed(0)}))
    assert [seen for _, seen in calls] == [None, 1, 2] and result.endings == [""]
    assert calls[1][0] > calls[0][0] + SIZE + 2
    clips = result.stories[0]
    assert len(clips) == 3 and clips[0].frames.shape == (4, 3, 16, 16) and clips[0].features.shape == (SIZE, DIM)
    assert (clips[0].features - clips[1].features).abs().max() > 1e-2
    # Ends at once; the first clip is written all the same.
    bias = pipe.llm.lm_head.register_forward_hook(lambda m, i, out: out.index_fill(-1, torch.tensor(2), 9.0))
    short = pipe(**(options | {"min_clips": 1, "generator": torch.Generator().manual_seed(0)}))
    bias.remove()
    assert len(short.stories[0]) == 1
    with pytest.raises(ValueError, match="min_clips"):
        pipe("Generate a story.", min_clips=3, max_clips=2)


def _likes_clips(pipe, score=6.0):
    """Raises the score of `<frame>`, so that texts hold clips."""
    pipe.llm.lm_head.register_forward_hook(
        lambda m, i, out: out.index_add(
            -1, torch.tensor([pipe.llm.config.frame_start_token_id]), torch.full((*out.shape[:-1], 1), score)
        )
    )
    return pipe


def test_clips_inside_generated_text_are_left_out():
    pipe = _likes_clips(cases.story())
    options = cases._story_inputs(1) | {"max_new_tokens": 2 * SIZE + 6}
    story = pipe(**options).stories[0]
    assert len(story) == 2 and not any("<" in clip.caption for clip in story)
    opened, written = pipe.open_clips([[1, 7]], max_new_tokens=2 * SIZE + 6, do_sample=False)
    frames = set(pipe.processor.frame_token_ids())
    assert frames & set(written[0]) and not frames & set(opened[0])

    pipe = _likes_clips(cases.comprehension(), 9.0)
    options = {"question": "What?", "video": parts.video(0), "max_new_tokens": 2 * SIZE + 14}
    answer = pipe(**options, generator=torch.Generator().manual_seed(0))
    pieces = list(pipe.stream(**options, generator=torch.Generator().manual_seed(0)))
    assert frames & set(answer.token_ids[0])
    assert answer.texts[0] and "".join(pieces) == answer.texts[0]


def test_bad_input_to_generation():
    pipe = cases.text_to_video()
    pipe.llm.generate = None  # everything is found out before the language model runs
    for prompt in (5, None, [5]):
        with pytest.raises(TypeError, match="prompt must be"):
            pipe(prompt)
    for arguments, message in (
        ({"prompt": ""}, "not empty"),
        ({"prompt": []}, "not empty"),
        ({"prompt": "a <video> of rain"}, "plain text"),
        ({"prompt": "<vid> rain"}, "plain text"),
        ({"prompt": "<frame_00003> rain"}, "plain text"),
        ({"prompt": "rain</s>"}, "plain text"),
        ({"prompt": "rain", "num_frames": 0}, "num_frames"),
        ({"prompt": "rain", "eta": 2.0}, "eta"),
        ({"prompt": "rain", "num_inference_steps": 2.5}, "num_inference_steps"),
        ({"prompt": "rain", "guidance_scale": float("nan")}, "guidance_scale"),
        ({"prompt": "rain", "unconditional_features": torch.zeros(1, 2, DIM)}, "unconditional_features"),
        ({"prompt": "rain", "kind": "gif"}, "kind"),
        ({"prompt": "rain", "generator": cases.generators(2)}, "2 generators for 1"),
        ({"prompt": "rain", "feature_sampling": "best"}, "feature_sampling"),
        ({"prompt": "rain", "var_scale": -1.0}, "var_scale"),
        ({"prompt": "rain", "num_videos_per_prompt": 0}, "num_videos_per_prompt"),
        ({"prompt": "rain", "clip_batch_size": 0}, "clip_batch_size"),
        ({"prompt": "rain", "num_inference_steps": 0}, "num_inference_steps"),
        ({"prompt": "rain", "output_type": "mp4"}, "output_type"),
        ({"prompt": "rain", "temperature": -1}, "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)
    components = dict(pipe.components) | {"llm": cases.llm(feature_dim=10)}
    with pytest.raises(ValueError, match="de-tokenizer reads"):
        cinetok.DivotTextToVideoPipeline(**components)


def test_half_precision_parts_next_to_full():
    pipe = cases.text_to_video()
    pipe.llm.to(torch.bfloat16)
    pipe.vae.to(torch.bfloat16)
    frames = pipe(**cases._video_inputs(2)).frames
    assert torch.isfinite(frames).all()
    pipe = cases.comprehension()
    pipe.llm.to(torch.bfloat16)
    assert all(pipe(**cases._comprehension_inputs(2)).texts)
