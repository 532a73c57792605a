"""Models of Hugging Face PEFT off their start, and its reading of files."""

import warnings

import torch


def moved(model, by=0.1):
    """The model, each trainable number of which went that far on average."""
    made = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn(p.shape, generator=made))
    return model


def adapted(model, config, by=0.1):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, which it sets for Conv1D
        return moved(peft.get_peft_model(model, config), by)


def read_by_peft(model, where):
    """Without a missing or an unknown key, of which it warns."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(model, where)
