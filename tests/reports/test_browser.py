"""All reports in Debian's Chromium: nothing runs or is requested; controls, keyboard and accessibility."""

from __future__ import annotations

import base64
import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from report_cases import HEADING, METHODS, make_batch, make_dataset, make_evaluation, write_run
from report_pages import HOSTILE

from diffmic_fast.config.preprocessing import Preprocessing
from diffmic_fast.reports.evaluation_report import write_evaluation_report
from diffmic_fast.reports.prediction_report import PredictionReport
from diffmic_fast.reports.training_report import write_training_report

pytestmark = pytest.mark.slow

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
TITLES = {
    "predictions": "Predictions",
    "evaluation": "Evaluation, 24 test images",
    "training": "Training, 2 epochs",
}
FILES = [f"{i:02d}.png" for i in range(12)]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The address of each report, with hostile names in it."""
    root = tmp_path_factory.mktemp("reports")
    report = PredictionReport(
        root / "predictions", HEADING, Preprocessing(), [("Checkpoint", HOSTILE[0])]
    )
    report.begin()
    names = [name.replace("/", "_") + ".png" for name in HOSTILE]
    report.add(make_batch([*FILES, *names], unreadable=[(HOSTILE[1], HOSTILE[0])]))
    predictions = report.finish()
    report.close()
    evaluation = make_evaluation([0, 1, 2] * 8, classes=(*HOSTILE[:2], "c"))
    names = [HOSTILE[i % len(HOSTILE)] + str(i) for i in range(24)]
    evaluated = write_evaluation_report(
        root / "evaluation", evaluation, make_dataset(root, evaluation, names), METHODS,
        timesteps=100, split="test", settings=[("Checkpoint", HOSTILE[3])],
    )  # fmt: skip
    losses = {"phase": "joint", "loss": 0.5, "guidance_loss": 1.0, "learning_rate": 0.1}
    trained = write_training_report(write_run(root / "run", [losses, losses]), HOSTILE[:2])
    found = {"predictions": predictions, "evaluation": evaluated, "training": trained}
    return {name: path.as_uri() for name, path in found.items()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM or not CHROMEDRIVER:
        pytest.skip("there is no chromium and chromedriver (Debian: chromium, chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield driver
    driver.quit()


def visit(browser, address, width=1400, scheme="light"):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(address)


def field(browser, name):
    return browser.find_element("id", name)


def shown(browser):
    """Names of the images that are shown, in their order."""
    script = "return [...document.querySelectorAll('.card:not([hidden])')].map(e => e.dataset.name)"
    return browser.execute_script(script)


def test_nothing_fails_runs_or_is_requested(browser, pages):
    for name, address in pages.items():
        visit(browser, address)
        assert browser.title == TITLES[name]
        assert browser.execute_script("return document.scripts.length") == 1
        assert browser.get_log("browser") == []
        messages = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
        requests = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        assert address in requests
        assert all(url == address or url.startswith("data:") for url in requests)
        assert base64.b64decode(browser.print_page()).startswith(b"%PDF")


def test_the_policy_stops_what_would_run(browser, pages):
    """Markup that is added to the page afterwards neither runs nor loads anything."""
    visit(browser, pages["predictions"])
    browser.execute_script(
        "const e = document.createElement('div'); e.innerHTML = arguments[0]; document.body.append(e);"
        "const s = document.createElement('script'); s.textContent = 'document.title = 1';"
        "document.body.append(s);",
        "<img src=x onerror='document.title=1'><img src='https://localhost/x.png'>",
    )
    assert browser.execute_async_script(
        "const done = arguments[0]; setTimeout(() => done(document.title), 200)"
    ) == TITLES["predictions"]  # fmt: skip
    assert any(
        "Content Security Policy" in entry["message"] for entry in browser.get_log("browser")
    )


def test_images_are_sorted_and_filtered(browser, pages):
    from selenium.webdriver.support.ui import Select

    visit(browser, pages["predictions"])
    data = browser.execute_script(
        "return [...document.querySelectorAll('.card')].map(e => ({...e.dataset}))"
    )
    readable = [card for card in data if card["label"] != "unreadable"]
    assert shown(browser) == [card["name"] for card in data]

    for value, sign in (("confidence", 1), ("-confidence", -1)):
        Select(field(browser, "sort")).select_by_value(value)
        expected = sorted(readable, key=lambda card: sign * float(card["confidence"]))
        assert shown(browser) == [*(card["name"] for card in expected), HOSTILE[1].split("/")[-1]]
    Select(field(browser, "sort")).select_by_value("number")

    Select(field(browser, "class")).select_by_value("1")
    ones = [card["name"] for card in data if card["label"] == "1"]
    assert 0 < len(ones) < len(data) and shown(browser) == ones
    assert field(browser, "status").text == f"{len(ones)} of {len(data)} images"
    Select(field(browser, "class")).select_by_value("unreadable")
    assert len(shown(browser)) == 1
    Select(field(browser, "class")).select_by_value("")

    field(browser, "least").send_keys("60")
    confident = [card["name"] for card in readable if float(card["confidence"]) >= 0.6]
    assert 0 < len(confident) < len(data) and shown(browser) == confident
    field(browser, "text").send_keys("no such name")
    assert shown(browser) == [] and field(browser, "nothing").is_displayed()
    browser.find_element("css selector", "button[type=reset]").click()
    assert browser.execute_async_script(
        "const done = arguments[0]; setTimeout(() => done(true), 50)"
    )
    assert len(shown(browser)) == len(data) and not field(browser, "nothing").is_displayed()

    heat = browser.find_element("css selector", ".heat")
    assert heat.is_displayed()
    field(browser, "show-heat").click()
    assert not heat.is_displayed()


def test_the_keyboard_reaches_everything_and_leaves_it_again(browser, pages):
    from selenium.webdriver import ActionChains, Keys

    def press(key):
        ActionChains(browser).send_keys(key).perform()
        return browser.execute_script(
            "const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.id || e.getAttribute('aria-labelledby') || e.className || e.tagName,"
            " s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2]"
        )

    visit(browser, pages["predictions"])
    reached = []
    for _ in range(40):
        name, outlined = press(Keys.TAB)
        if name == "BODY":
            break
        assert outlined, f"{name} has the focus, which is not visible"
        reached.append(name)
    else:
        raise AssertionError(f"the focus does not leave the page: {reached}")
    controls = {"skip", "sort", "class", "least", "most", "text", "flagged", "show-heat", "i1"}
    assert controls <= set(reached)
    assert sum(name.startswith("i") for name in reached) == 1  # one image is in the tab order

    browser.execute_script("document.querySelector('article').focus()")
    assert press(Keys.ARROW_DOWN) == ["i2", True]
    assert press(Keys.END)[0] == f"i{len(shown(browser))}"
    assert press(Keys.ARROW_DOWN)[0] == f"i{len(shown(browser))}"
    assert press(Keys.HOME)[0] == "i1"


@pytest.mark.parametrize(
    ("width", "scheme"), [(1400, "light"), (1400, "dark"), (400, "light"), (400, "dark")]
)
@pytest.mark.parametrize("name", list(TITLES))
def test_axe_finds_no_serious_fault(browser, pages, name, width, scheme):
    visit(browser, pages[name], width, scheme)
    for details in browser.find_elements(
        "css selector", "main > section > details, .figure details"
    ):
        browser.execute_script("arguments[0].open = true", details)
    browser.execute_script(
        "for (const e of document.querySelectorAll('.card')) e.style.contentVisibility = 'visible'"
    )
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert colour == {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 22, 27)"}[scheme]
    browser.execute_script(Path(str(files("axe_core_python") / "axe.min.js")).read_text("utf-8"))
    found = browser.execute_async_script("axe.run(document).then(arguments[0])")
    assert "color-contrast" in {rule["id"] for rule in found["passes"]}
    serious = [
        (rule["id"], rule["nodes"][0]["html"][:200])
        for rule in found["violations"]
        if rule["impact"] in ("serious", "critical")
    ]
    assert serious == []
