"""The browser that dashboard tests stand on starts and runs scripts."""

from playwright.sync_api import Page


def test_a_page_runs_scripts(page: Page) -> None:
    page.set_content("<p>empty</p><script>document.querySelector('p').textContent = 'ran'</script>")
    assert page.inner_text("p") == "ran"
