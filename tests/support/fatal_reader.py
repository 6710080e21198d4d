"""Image reader that ends, or stops for ever, the process that decodes an image named so, a child process as well."""

import json
import os
import signal
from pathlib import Path

from fastvae.data.encoding.image_reader import ImageReader


class FatalReader(ImageReader):
    """Pickled by its name, so that a child process has the same picture(). Names: "fatal" and "endless".

    FATAL_KEYS: JSON object of keys and the number of the signal that ends the process. FATAL_ONCE: path of a file that
    the first process to decode an image makes before it ends.
    """

    def picture(self, file, bucket):
        once = os.environ.get("FATAL_ONCE")
        if "fatal" in file.key or (once and not Path(once).exists()):
            if once:
                Path(once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if number := json.loads(os.environ.get("FATAL_KEYS", "{}")).get(file.key):
            os.kill(os.getpid(), number)
        if "endless" in file.key:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().picture(file, bucket)
