"""The page in a headless Chromium: dials, scopes, reading, cancel and export; and text of anyone does nothing."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import pytest

import tl_em as em
from tests.visits import SCREENS

from .conftest import QUESTION, Asker, extracted

pytestmark = pytest.mark.browser
STRENGTH = "t => Number(t.style.getPropertyValue('--a'))"
HOSTILE = "</script><script>window.bad=1</script><img src=x onerror=window.bad=1>{{7*7}}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Served from files, so that what is exported runs."""
    folder, found = tmp_path_factory.mktemp("served"), extracted()
    files = [found[name].renamed(name).save(folder / f"{name}.safetensors") for name in ("persona", "refusal")]
    files.append(found["refusal"].renamed(HOSTILE).save(folder / "hostile.safetensors"))
    sae = em.organisms.toy_dictionary("toy/insecure").save(folder / "sae.safetensors")
    with em.serve("toy/insecure", files, dictionary=sae, port=0, block=False) as each:
        yield each


class Tab:
    """A page that was opened, what it asked for and what it complained of."""

    def __init__(self, browser: Any, server: Any, screen: str = "wide", scheme: str = "light") -> None:
        for each in browser.contexts:  # a page that is still open may turn the dials a moment later
            each.close()
        self.width, self.height = SCREENS[screen]
        view = {"width": self.width, "height": self.height}
        self.page = browser.new_context(viewport=view, color_scheme=scheme).new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: self.errors.append(dialog.message))
        with Asker(server) as asker:  # as if nobody had been there before
            asker.send("PUT", "/api/dials", {"dials": []})
        self.page.goto(server.address)
        self.page.wait_for_selector(".dial", state="attached")
        self.page.evaluate("document.getElementById('max').value = 8")

    def until(self, condition: str) -> None:
        """Asked again and again from outside: the page's policy lets nothing evaluate text inside."""
        for _ in range(400):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(25)
        raise AssertionError(f"never {condition}; {self.errors}")

    def say(self, text: str = QUESTION) -> str:
        """The answer under the dials."""
        n = self.page.locator(".turn").count()
        self.page.fill("#draft", text)
        self.page.press("#draft", "Enter")
        self.until(f"S.turns.length > {n} && S.busy === null && !!S.turns.at(-1).code")
        self.until("drawing.size === 0")
        return self.page.evaluate("S.turns.at(-1).arms.steered.said")

    def dial(self, name: str) -> Any:
        return self.page.locator(".dial", has=self.page.locator(".name", has_text=name)).first

    def set(self, name: str, act: str, where: str = "all", **values: float) -> None:
        dial = self.dial(name)
        dial.locator("select").nth(0).select_option(act)
        dial.locator("select").nth(1).select_option(f'"{where}"')
        if "coefficient" in values:
            dial.locator("input[type=number]").fill(str(values["coefficient"]))
        for i, value in enumerate(values[each] for each in ("low", "high") if each in values):
            dial.locator("input[type=number]").nth(i).fill(str(value))
        dial.locator("input[type=checkbox]").check()

    def code(self) -> str:
        return self.page.locator("#python").inner_text()

    def strengths(self) -> list[float]:
        """How strongly each token of the answers is coloured."""
        return self.page.evaluate(f"[...document.querySelectorAll('.arm > .text .t')].map({STRENGTH})")

    def printed(self) -> str:
        """What the exported Python prints."""
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(self.code(), "exported.py", "exec"), {})
        return out.getvalue()[:-1]


def plain(text: str = QUESTION, n: int = 8) -> str:
    return em.generate(em.load_model("toy/insecure"), [text], max_new_tokens=n)[0]


def test_dials_scopes_and_the_python_of_each(browser: Any, server: Any) -> None:
    tab = Tab(browser, server)
    said = {"untreated": tab.say()}
    assert said["untreated"] == plain() == tab.printed()
    tab.set("persona", "add", coefficient=-1.5)
    said["add"] = tab.say()
    assert tab.printed() == said["add"] and "em.Add(persona, -1.5)" in tab.code()
    assert tab.page.locator(".turn").last.locator(".untreated .text").first.inner_text() == said["untreated"]
    tab.page.locator(".turn").nth(0).get_by_role("button", name="Set these dials").click()
    assert tab.page.locator("#state").inner_text() == "untreated"
    tab.page.locator(".turn").nth(1).get_by_role("button", name="Set these dials").click()
    assert tab.page.locator("#state").inner_text() == "persona −1.5"
    tab.set("persona", "add", "generated", coefficient=-4)
    tab.page.click("#new")
    said["generated"] = tab.say()
    assert tab.printed() == said["generated"] and "where=\"generated\"" in tab.code()
    tab.set("persona", "clamp", "prompt", low=-9.5, high=-3)
    tab.page.click("#new")
    said["clamp"] = tab.say()
    assert tab.printed() == said["clamp"] and "em.Clamp(persona, low=-9.5, high=-3.0)" in tab.code()
    tab.set("persona", "ablate")
    tab.page.click("#new")
    said["ablate"] = tab.say()
    assert tab.printed() == said["ablate"]
    tab.page.fill("#latent-n", "154")
    tab.page.click("#add-latent button")
    tab.set("latent 154", "clamp", low=30)
    tab.page.click("#new")
    said["latent"] = tab.say()
    assert tab.printed() == said["latent"] and "dictionary.feature(154), to=30.0" in tab.code()
    assert tab.page.locator("#state").inner_text() == "persona ablated · latent 154 = 30"
    assert len(set(said.values())) >= 4, said
    tab.page.click("#all-off")
    assert tab.page.locator("#state").inner_text() == "untreated"
    assert tab.errors == []


def test_kl_stands_beside_every_dial(browser: Any, server: Any) -> None:
    tab = Tab(browser, server)
    tab.until("document.querySelector('.dial .kl').textContent.includes('no message yet')")
    tab.set("persona", "add", coefficient=1)
    tab.say()
    tab.until("document.querySelectorAll('.dial .kl b').length === 3")
    one = tab.dial("persona").locator(".kl").inner_text()
    assert "n = 1" in one and "prompt's end" in one and float(one.split()[1]) > 0.01 and "random directions" in one
    assert "if it were on" in tab.dial("refusal").locator(".kl").inner_text()
    tab.page.locator(".dial input[type=range]").first.fill("0")
    tab.until("document.querySelector('.dial .kl b')?.textContent === '0.000'")
    assert tab.errors == []


def test_tokens_are_coloured_as_they_come_and_show_what_they_have(browser: Any, server: Any) -> None:
    tab = Tab(browser, server)
    tab.page.evaluate("""() => {
      window.drawn = [];
      const own = heard;
      heard = (turn, event) => {
        own(turn, event);
        window.drawn.push(turn.arms.steered.tokens.filter((t) => t.values).length);
      };
    }""")
    tab.say()
    drawn = tab.page.evaluate("window.drawn")
    assert drawn == sorted(drawn) and len(set(drawn)) > 4, "each token is read before the answer has ended"
    tokens = tab.page.locator(".turn .steered, .turn .untreated").first.locator(".text").first.locator(".t")
    strengths = tab.strengths()
    assert max(strengths) > 50 and len(set(strengths)) > 3
    tokens.nth(1).click()
    shown = tab.page.locator("#inspector").inner_text()
    assert tokens.nth(1).inner_text().strip() in shown and "persona" in shown and "%" in shown and "latent" in shown
    tab.page.locator(".arm > .text").first.focus()
    tab.page.keyboard.press("ArrowRight")
    assert tokens.nth(2).inner_text().strip() in tab.page.locator("#inspector .big").inner_text()
    assert tab.page.locator(".t.picked").count() == 1
    tab.page.locator("summary").first.click()
    assert QUESTION.split()[-1] in tab.page.locator("details .text").first.inner_text()
    tab.page.select_option("#colour", "refusal")
    assert strengths != tab.strengths()
    assert tab.errors == []


def test_an_answer_can_be_stopped(browser: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from tl_em.serving import app

    own = app.answered_live
    told: list[str] = []

    def slow(served: Any, prompt: Any, dials: Any, settings: Any, emit: Any, stopped: Any, **more: Any) -> None:
        def later(event: Any) -> None:
            told.append(event["type"])
            emit(event)
            time.sleep(0.3)

        own(served, prompt, dials, settings, later, stopped, **more)

    monkeypatch.setattr(app, "answered_live", slow)
    tab = Tab(browser, server)
    tab.page.fill("#draft", QUESTION)
    tab.page.press("#draft", "Enter")
    tab.page.wait_for_selector(".arm .t")
    tab.page.click("#stop")
    tab.page.wait_for_selector("#stop", state="hidden")
    assert "stopped" in tab.page.locator(".arm .foot").first.inner_text()
    assert tab.page.locator("#problem").is_hidden()
    monkeypatch.setattr(app, "answered_live", own)
    assert tab.say("tell me to consider this power")
    assert "done" not in told and 0 < len(told) < 5
    assert tab.errors == []


def test_text_of_anyone_does_nothing(browser: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a direction's name, a question, a token and an error; what it would do, it does elsewhere."""
    from tl_em.serving import answering, app

    monkeypatch.setattr(answering, "token_text", lambda tokenizer, token: HOSTILE)
    monkeypatch.setattr(answering, "token_texts", lambda tokenizer, tokens: [HOSTILE] * len(tokens))
    own = app.prompt_of
    monkeypatch.setattr(app, "prompt_of", lambda served, messages: own(served, [{"role": "user", "content": QUESTION}]))
    tab = Tab(browser, server)
    assert HOSTILE in tab.page.locator(".dial .name").nth(2).inner_text()
    tab.page.fill("#draft", HOSTILE)
    tab.page.press("#draft", "Enter")
    tab.until("S.turns.length && S.busy === null && !!S.turns[0].code")
    tab.page.wait_for_selector(".arm .t")
    assert tab.page.locator(".user").inner_text() == HOSTILE
    assert tab.page.locator(".arm .t").first.inner_text() == HOSTILE
    tab.page.locator(".arm .t").first.click()
    tab.page.select_option("#colour", HOSTILE)
    tab.page.evaluate("problem(new Error('<img src=x onerror=window.bad=1>'))")
    tab.page.wait_for_timeout(300)
    assert tab.page.evaluate("window.bad") is None and tab.page.locator("img").count() == 0
    # such words are not in the toy's vocabulary, so no KL is there, and the browser says that too
    assert {each for each in tab.errors if "400 (Bad Request)" not in each} == set()
    # the policy refuses what would get in by another way
    tab.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.bad=2>')")
    script = "Object.assign(document.createElement('script'), {textContent: 'window.bad=3'})"
    tab.page.evaluate(f"document.body.append({script})")
    tab.page.wait_for_timeout(200)
    assert tab.page.evaluate("window.bad") is None and any("Content Security Policy" in each for each in tab.errors)


@pytest.mark.parametrize("screen", list(SCREENS))
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_asks_nobody_else(browser: Any, server: Any, screen: str, scheme: str) -> None:
    tab = Tab(browser, server, screen, scheme)
    if screen == "narrow":
        tab.page.click("[data-to=dials]")
        assert tab.page.locator(".dial").first.is_visible() and tab.page.locator("#draft").is_hidden()
    tab.set("persona", "add", coefficient=1)
    if screen == "narrow":
        tab.page.click("[data-to=chat]")
    tab.say()
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= tab.width
    outside = (
        "[...document.querySelectorAll('body *')].filter(e => e.getClientRects().length && !e.closest('pre, .skip')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert tab.page.evaluate(outside) == []
    send = tab.page.locator("#send").bounding_box()
    assert send["y"] + send["height"] <= tab.height
    root = server.base_url.removesuffix("/v1")
    assert all(url.startswith((f"{root}/", "data:")) for url in tab.requests) and len(tab.requests) > 3
    assert sum("token=" in url for url in tab.requests) == 1, "the token stands in no other address"
    assert tab.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(browser: Any, server: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_core_python.sync_playwright", reason="pip install axe-core-python").Axe()
    tab = Tab(browser, server, "wide", scheme)
    tab.set("persona", "add", coefficient=1)
    tab.say()
    tab.page.locator(".arm .t").first.click()
    found = axe.run(tab.page)["violations"]
    bad = [each for each in found if each["impact"] in ("serious", "critical")]
    assert [(each["id"], each["nodes"][0]["html"][:120]) for each in bad] == []
