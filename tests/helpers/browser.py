"""A headless Chromium, driven by Selenium, without a network."""

import shutil
from importlib.util import find_spec

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


def missing():
    """Returns what is missing for tests in a browser; empty if nothing is."""
    parts = {"Chromium": BROWSER, "chromedriver": DRIVER, "selenium": find_spec("selenium")}
    return ", ".join(name for name, found in parts.items() if not found)


class Browser:
    """A context manager that starts the browser once; `open` loads a page, `run` evaluates JavaScript in it."""

    def __enter__(self):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        # --no-sandbox: root may not start it otherwise. The resolver rule lets no request leave this machine.
        for argument in (
            "headless=new",
            "no-sandbox",
            "disable-dev-shm-usage",
            "host-resolver-rules=MAP * ~NOTFOUND",
        ):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        return self

    def __exit__(self, *_):
        self.driver.quit()

    def open(self, path, scheme="light", width=1280):
        """Loads a page at a width in CSS pixels, in the "light" or "dark" scheme, and empties the console."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.console()
        self.driver.get(path.as_uri())

    def run(self, code, *arguments):
        return self.driver.execute_script(f"return {code}", *arguments)

    def console(self):
        """Returns the messages since the last call: errors, refused requests and what scripts have logged."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def texts(self, selector):
        return [element.text for element in self.driver.find_elements("css selector", selector)]
