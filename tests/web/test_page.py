"""The page over HTTP, and once in a browser with a complete service."""

import base64
import hashlib
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.async_api import expect

from api.settings import Settings
from api.web.page import CDN, FOLDER, policy, render, without_comments
from support.browser import chromium, needs_chromium, tabs
from support.guarded import guarded
from support.harness import SHEET, running
from support.http_app import assert_problem
from support.node import ROOT, needs_client, needs_node

INDEX = (FOLDER / "index.html").read_text("utf-8")


def rendered(*, own_client: bool, **settings: Any) -> str:
    return render(INDEX, Settings(_env_file=None, editor="local", **settings), own_client=own_client)


def directives(text: str) -> dict[str, list[str]]:
    return {name: sources for name, *sources in (part.split() for part in text.split("; "))}


async def test_the_csp_allows_only_the_pages_own_files(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        answer = await service.http.get("/")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-cache"
        allowed = directives(answer.headers["content-security-policy"])
        assert allowed["default-src"] == allowed["base-uri"] == allowed["form-action"] == ["'none'"]
        assert allowed["frame-ancestors"] == ["'none'"]
        assert allowed["style-src"] == ["'self'"]
        assert allowed["img-src"] == ["'self'", "blob:"]
        own = f"127.0.0.1:{service.port}"
        assert allowed["connect-src"] == ["'self'", f"ws://{own}", f"wss://{own}"]
        assert allowed["require-trusted-types-for"] == ["'script'"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        for path in re.findall(r'(?:src|href)="(/[^"]+)"', answer.text):
            file = await service.http.get(path)
            assert file.status_code == 200, path
            assert path == "/docs" or file.headers["x-content-type-options"] == "nosniff"


async def test_read_only_routes_refuse_other_methods(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        for path in ("/", "/docs", "/openapi.json", "/static/stagecast.js"):
            for method in ("POST", "DELETE", "OPTIONS"):
                answer = await service.http.request(method, path)
                assert_problem(answer, 405, "method_not_allowed")
                assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_the_page_has_no_inline_script_or_style() -> None:
    assert not re.search(r"\sstyle=|\son[a-z]+=|javascript:", INDEX)
    assert not re.search(r"<style|<script(?![^>]*\ssrc=)", INDEX)
    for file in FOLDER.glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", file.read_text("utf-8")
        )


def test_the_cdn_is_used_only_without_an_own_copy_of_the_client() -> None:
    own = rendered(own_client=True)
    assert '<script src="/static/vendor/socket.io.min.js" defer></script>' in own
    assert CDN not in own
    assert CDN not in policy("x", own_client=True)
    assert directives(policy("x", own_client=False))["script-src"] == ["'self'", CDN]
    foreign = rendered(own_client=False)
    assert "/static/vendor/" not in foreign
    assert f'<template id="client"><script src="{CDN}" integrity="sha384-' in foreign


@needs_client
def test_the_cdn_client_has_the_hash_of_the_npm_package() -> None:
    client = (FOLDER / "vendor" / "socket.io.min.js").read_bytes()
    digest = base64.b64encode(hashlib.sha384(client).digest()).decode()
    assert f'integrity="sha384-{digest}"' in rendered(own_client=False)


def test_the_page_contains_the_url_of_the_sample_face() -> None:
    page = rendered(own_client=True, public_url="http://localhost:3000/a&b")
    assert 'data-face="http://localhost:3000/a&amp;b/static/samples/face.webp"' in page


@pytest.mark.parametrize("host", ["localhost:3000", "a-b.example.com", "[::1]:3000"])
def test_the_csp_allows_websockets_to_the_pages_host(host: str) -> None:
    assert directives(policy(host, own_client=True))["connect-src"] == ["'self'", f"ws://{host}", f"wss://{host}"]


@pytest.mark.parametrize("host", ["", "x; script-src *", "a b", "x,y", "*", "*.example.com", "é.example.com"])
def test_an_invalid_host_is_not_added_to_the_csp(host: str) -> None:
    assert directives(policy(host, own_client=True))["connect-src"] == ["'self'"]


async def test_the_page_states_whether_a_token_is_required(tmp_path: Path) -> None:
    async with running(tmp_path / "open") as service:
        assert 'data-callers="anybody"' in (await service.http.get("/")).text
    async with guarded(tmp_path / "guarded") as service, httpx2.AsyncClient(base_url=service.url) as stranger:
        assert 'data-callers="token"' in (await stranger.get("/")).text


@needs_node
def test_scripts_lose_only_comments_in_the_page(tmp_path: Path) -> None:
    for script in FOLDER.glob("*.js"):
        (tmp_path / script.name).write_bytes(without_comments(script.read_bytes()))
    compare = """
      import { readFileSync, readdirSync } from "node:fs";
      import { tokenizer } from "acorn";
      const [whole, short] = process.argv.slice(-2);
      const tokens = (folder, name) =>
        [...tokenizer(readFileSync(`${folder}/${name}`, "utf8"), { ecmaVersion: 2022, sourceType: "module" })]
          .map(({ type, value }) => [type.label, value?.pattern ?? value]);
      const same = (name) => JSON.stringify(tokens(whole, name)) === JSON.stringify(tokens(short, name));
      console.log(readdirSync(short).filter(same).length);"""
    command = ["node", "--input-type=module", "-e", compare, str(FOLDER), str(tmp_path)]
    same = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert int(same) == len(list(FOLDER.glob("*.js"))) > 10


@needs_chromium
@needs_client
async def test_one_click_on_the_samples_makes_a_picture(tmp_path: Path) -> None:
    async with running(tmp_path) as service, chromium() as browser, tabs(browser, service.url) as [tab]:
        await tab["#try-samples"].click()
        face = await tab["html"].get_attribute("data-face")
        await expect(tab["#tray li"]).to_have_count(4 if face else 3)
        await expect(tab["#prompt"]).not_to_have_value("")
        await tab.shows("completed")
        await expect(tab["#after"]).to_have_js_property("naturalWidth", 1024)
        await expect(tab["#before"]).to_have_js_property("naturalWidth", SHEET[0])
        await expect(tab["#history .tile"]).to_have_count(1)
        await expect(tab["#credit"]).to_have_text("99 credits")
