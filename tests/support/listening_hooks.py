"""Hooks of accelerate and diffusers that record the module of each forward, and change nothing."""

import accelerate.hooks
import diffusers.hooks


class Listening(accelerate.hooks.ModelHook):
    """A hook of accelerate."""

    def __init__(self, calls):
        self.calls = calls

    def pre_forward(self, module, *args, **kwargs):
        self.calls.append(module)
        return args, kwargs


class Registered(diffusers.hooks.ModelHook):
    """A hook of diffusers, around a forward."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def pre_forward(self, module, *args, **kwargs):
        self.calls.append(module)
        return args, kwargs
