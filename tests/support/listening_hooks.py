"""Hooks of accelerate and diffusers that note whose forward they hear, and change nothing."""

import accelerate.hooks
import diffusers.hooks


class Listening(accelerate.hooks.ModelHook):
    """accelerate's kind of hook."""

    def __init__(self, calls):
        self.calls = calls

    def pre_forward(self, module, *args, **kwargs):
        self.calls.append(module)
        return args, kwargs


class Registered(diffusers.hooks.ModelHook):
    """diffusers' kind of hook, around a forward."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def pre_forward(self, module, *args, **kwargs):
        self.calls.append(module)
        return args, kwargs
