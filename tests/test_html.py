"""The page of quantize.py --html: its tokenizer, its arithmetic and its text, and what a browser makes of it."""

import contextlib
import importlib.util
import json
import random
import re
import shutil
import subprocess
from functools import partial

import pytest
import torch
from conftest import ROOT, make_text, random_model, refused, save_model
from tokenizers import AddedToken, processors

import quantize
from generate import generate
from int8 import load_quantized, save_quantized
from lib import corpus
from lib.checkpoint import read_tokenizer
from lib.cli import UserError
from lib.gguf import CUTS
from lib.page import compile_wasm, tokenizer, write_html

needs_node = pytest.mark.skipif(not shutil.which("node"), reason="needs node")
# Runs the worker's code of a page: call(name, values) is a message to it, and its answer.
WORKER = """
const fs = require("fs"), vm = require("vm"), replies = [], [page, input] = process.argv.slice(2);
const html = fs.readFileSync(page, "utf8");
const part = id => html.match(new RegExp(`<script id="${id}"[^>]*>([^]*?)</script>`))[1];
Object.assign(globalThis, {postMessage: reply => replies.push(reply), onmessage: null});
vm.runInThisContext(part("worker"));
const call = (...data) => {
  onmessage({data});
  const reply = replies.pop();
  if (reply?.error) throw reply.error;
  return reply;
};
const given = JSON.parse(fs.readFileSync(input, "utf8"));
"""
WRITE = """
const weights = part("weights");
call("open", {wasm: part("wasm"), about: part("about"), bytes: weights.length / 4 * 3});
call("load", {weights: weights.slice(0, 4096), last: false});
call("load", {weights: weights.slice(4096), last: true});
console.log(JSON.stringify(given.map(([prompt, temperature, topP, seed, count]) => {
  let reply = call("begin", {prompt, temperature, topP, seed}), text = reply.text;
  while (!reply.ended && end < count) text += (reply = call("more", {seconds: 0.001})).text;
  return [Array.from(numbers(BigInt64Array, tokens, end), Number), text];
})));
"""


@pytest.fixture(scope="session")
def compiler():
    if not importlib.util.find_spec("ziglang") and not shutil.which("clang++"):
        pytest.skip("needs a compiler: pip install -r requirements-html.txt")


def node(tmp_path, page, code, given):
    (tmp_path / "run.js").write_text(WORKER + code)
    (tmp_path / "given.json").write_text(json.dumps(given))
    command = ["node", tmp_path / "run.js", page, tmp_path / "given.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---------------------------------------------------------------- the tokenizer

PIECES = ["a", "B", "owl", "Fox", " sees", "'s", "'LL", "'ſ", "n't", " ", "  ", "\n", "\r\n", "\t", "\x0b",
          "\x85", "\xa0", "\u2003", "\u2028", "\ufeff", "\u200d", "\x00", "0", "12345", "½", "Ⅷ",
          "٣", ".", "...", "?!", " -", "_", "“", "é", "e\u0301", "\u0301", "Å", "ﬁ", "ß", "ı", "ж",
          "שלום", "مرحبا", "日本", "한", "가", "🦉", "👩\u200d👩\u200d👧", "🇩🇪", "𝒜", "<|endoftext|>",
          "<|endof", "<s>"]


def published_tokenizer(cut):
    """A tokenizer that cuts texts as a published model's does, and has its normalizer, options and special tokens."""
    made = corpus.train_tokenizer([make_text(2000), "".join(PIECES) * 50], 400, end=True)
    made.pre_tokenizer = CUTS[cut].pre_tokenizer()
    if CUTS[cut].nfc:
        made.normalizer = CUTS[cut].normalizer()
    file = json.loads(made.to_str())
    file["model"]["ignore_merges"] = CUTS[cut].ignore_merges
    made = made.from_str(json.dumps(file))
    if cut == "llama-bpe":
        made.add_tokens(["<s>"])
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    return made


TOKENIZERS = {"bytes": partial(corpus.train_tokenizer, [], 256),
              "bytes, end": partial(corpus.train_tokenizer, [], 256, end=True),
              "learned": partial(corpus.train_tokenizer, [make_text(2000)], 320),
              **{cut: partial(published_tokenizer, cut) for cut in CUTS}}


@needs_node
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_pages_tokenizer_equals_hugging_faces(name, tmp_path):
    theirs, rng = TOKENIZERS[name](), random.Random(1)
    model = random_model(vocab_size=theirs.get_vocab_size(), bos=theirs.token_to_id("<s>"))
    save_model(model, tmp_path)
    theirs.save(str(tmp_path / "tokenizer.json"))
    texts = ["".join(rng.choices(PIECES, k=rng.randrange(30))) for _ in range(10_000)] + ["a" * 10_000]
    about = json.dumps(tokenizer(tmp_path, model.config))
    ids, decoded = node(tmp_path, ROOT / "lib" / "page.html", f"const tokenizer = new Tokenizer({about});" """
        const ids = given.map(text => tokenizer.encode(text));
        const bytes = of => Buffer.concat(of.map(id => tokenizer.bytes[id]));
        const text = of => new TextDecoder("utf-8", {ignoreBOM: true}).decode(bytes(of));
        console.log(JSON.stringify([ids, ids.map(text)]));
        """, texts)
    assert ids == [encoding.ids for encoding in theirs.encode_batch(texts)]
    assert decoded == theirs.decode_batch(ids)


# ---------------------------------------------------------------- the arithmetic and the text

@needs_node
@pytest.mark.long
def test_the_kernels_are_exact_in_webassembly(compiler, tmp_path):
    sources = [ROOT / "tests/selftest.cpp", *(ROOT / "csrc").glob("[dw]*.cpp"), *(ROOT / "csrc/kernels").glob("*.cpp")]
    compile_wasm(sources, tmp_path / "selftest.wasm")
    code = """
        const {WASI} = require("wasi"), system = new WASI({version: "preview1"});
        const wasm = new WebAssembly.Module(require("fs").readFileSync(process.argv[1]));
        process.exitCode = system.start(new WebAssembly.Instance(wasm, {wasi_snapshot_preview1: system.wasiImport}));"""
    done = subprocess.run(["node", "-e", code, tmp_path / "selftest.wasm"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"wasm: \d+ cases, 0 failed", done.stdout)


SHAPES = {"bytes": {}, "ends, heads share": {"n_kv_head": 2, "tie_embeddings": False, "eos": [256], "vocab_size": 257},
          "llama": {"qk_norm": False, "head_dim": 24, "n_embd": 36, "vocab_size": 320},
          "slices, fine head": {"n_hidden": 96}}


@pytest.fixture(scope="session", params=SHAPES)
def page(compiler, request, tmp_path_factory):
    """A page, and the int8 folder that it is made of."""
    folder, fields = tmp_path_factory.mktemp("page"), SHAPES[request.param]
    model = random_model(std=0.2, block_size=64, **fields)
    parts = {"fine_head": True, "slices": 4} if "fine" in request.param else {}
    save_quantized(model, folder / "int8", **parts)
    ends = "eos" in fields
    made = corpus.train_tokenizer([make_text(2000)], min(320, model.config.vocab_size - ends), end=ends)
    made.save(str(folder / "int8" / "tokenizer.json"))
    write_html(folder / "int8", folder / "an owl's & {{size}} fox.html")
    return folder / "an owl's & {{size}} fox.html", folder / "int8"


@needs_node
def test_the_page_writes_what_sample_py_writes(page, tmp_path):
    """To the bit of each float, so that the texts are equal at every setting, also past the context."""
    path, folder = page
    asked = [("Owl sees", 0, 1, 0, 200), ("Fox", 0.8, 1, 7, 200), ("日本 🦉", 1.2, 0.7, 2**32 - 1, 150),
             ("", 1, 1, 3, 80)]
    model, theirs = load_quantized(folder), read_tokenizer(folder)
    pairs = zip(asked, node(tmp_path, path, WRITE, asked), strict=True)
    for (prompt, temperature, top_p, seed, _), (ids, text) in pairs:
        start = theirs.encode(prompt or "\n").ids
        new = generate(model, torch.tensor([start]), len(ids) - len(start), temperature=temperature, top_p=top_p,
                       eos=model.config.eos, seed=seed)
        assert ids == start + [token.item() for token in new]
        assert text.rstrip("\ufffd") == theirs.decode(ids[len(start):]).rstrip("\ufffd")


def test_what_a_page_cannot_express_is_refused(script, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("lib.page.ROOT", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(script(quantize.main, "--html", "--no-compare"), "--html", "requirements-html.txt")
    made = corpus.train_tokenizer([], 256)
    made.add_tokens([AddedToken("<x>", lstrip=True)])
    for size, said in (257, "without conditions, got '<x>'"), (256, "tokens up to 256, the model knows 256"):
        made.save(str(folder / "tokenizer.json"))
        with pytest.raises(UserError, match=said):
            tokenizer(folder, random_model(vocab_size=size).config)
        refused(script(quantize.main, "--checkpoint", folder, "--html", "--no-compare"), "tokenizer.json")
        assert not folder.with_name(f"{folder.name}-int8").exists()  # before any work
        made = corpus.train_tokenizer([], 256, end=True)


# ---------------------------------------------------------------- a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


one_page = pytest.mark.parametrize("page", ["bytes"], indirect=True)


@pytest.fixture
def browse(page):
    """browse(flags of the browser, options of a tab) opens the page from its file."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as playwright, contextlib.ExitStack() as stack:
        def browse(*flags, **options):
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *flags])
            stack.callback(browser.close)
            tab = browser.new_page(**options)
            tab.requests = []
            tab.on("request", lambda request: tab.requests.append(request.url))
            tab.goto(page[0].as_uri())
            return tab
        yield browse


def wait(tab, expression):
    for _ in range(1000):  # playwright's own function needs eval, which the page forbids
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(30)
    raise AssertionError(f"{expression}: not within half a minute; {tab.text_content('#status')}")


def written(tab):
    """What the page writes behind the prompt until it is stopped."""
    tab.click("#write:enabled")
    wait(tab, "document.querySelector('#text').lastChild.data.length > 20")
    tab.click("#write")
    wait(tab, "/^Stopped|^The text has ended/.test(document.querySelector('#status').textContent)")
    return tab.evaluate("document.querySelector('#text').lastChild.data")


@one_page
def test_a_browser_opens_the_page_and_writes(browse, page):
    tab = browse()
    tab.fill("#prompt", "Owl sees")
    tab.fill("#seed", "1")
    first = written(tab)
    assert tab.text_content("#text b") == "Owl sees"
    model, theirs = load_quantized(page[1]), read_tokenizer(page[1])
    new = generate(model, torch.tensor([theirs.encode("Owl sees").ids]), 20, temperature=0.8, seed=1)
    assert first.startswith(theirs.decode([token.item() for token in new]).rstrip("\ufffd"))
    assert re.fullmatch(r"Stopped: [\d,]+ tokens, seed 1\.", tab.text_content("#status"))
    assert re.fullmatch(r"[\d,]+ tokens/s", tab.text_content("#speed"))
    for odd in ("''", "'x'.repeat(10000)", r"'🦉👩\u200d👧\ud83d'", "'שלום עולם'", "'</script><b>&amp;'",
                r"'\0\x07\r\n\t'"):
        tab.evaluate(f"document.querySelector('#prompt').value = {odd}")
        assert written(tab)
    assert all(url.startswith(("file:", "blob:")) for url in tab.requests)
    refused = "new Promise(done => addEventListener('securitypolicyviolation', done)).then(e => e.blockedURI)"
    asked = "fetch('https://example.org/').catch(() => {}); "
    assert tab.evaluate(f"() => {{ const said = {refused}; {asked} return said; }}").startswith("https://example.org")


@one_page
def test_the_page_works_by_keyboard_on_a_phone(browse):
    tab = browse(viewport={"width": 320, "height": 640}, color_scheme="dark")
    tab.wait_for_selector("#write:enabled")
    names = []
    for _ in range(5):
        tab.keyboard.press("Tab")
        names.append(tab.evaluate("(document.activeElement.labels?.[0] ?? document.activeElement).textContent.trim()"))
    assert [re.split(r"[:\n]", name)[0] for name in names] == [
        "The beginning of the text", "Temperature", "Top-p", "Seed", "Write"]
    tab.keyboard.press("Enter")
    wait(tab, "document.querySelector('#text').lastChild?.data.length > 500")
    tab.keyboard.press("Escape")
    wait(tab, "document.querySelector('#status').textContent.startsWith('Stopped')")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 320
    color = tab.evaluate("getComputedStyle(document.body).color")
    assert min(map(int, re.findall(r"\d+", color))) > 200  # light on dark
    tab.focus("#prompt")
    tab.keyboard.press("Control+Enter")
    wait(tab, "document.querySelector('#write').textContent === 'Stop'")


@one_page
@pytest.mark.parametrize("flag, said", [("--jitless", "needs WebAssembly, which"),
                                        ("--no-enable-sse4-1", "needs WebAssembly with SIMD")])
def test_a_browser_without_webassembly_is_told(browse, flag, said):
    tab = browse(f"--js-flags={flag}")
    wait(tab, "document.querySelector('#status').textContent !== 'Loading the model ...'")
    assert said in tab.text_content("#status") and tab.is_disabled("#write")
