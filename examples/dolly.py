"""Follows an instruction with Dolly v2, the model of the article that started this project.

Usage: python examples/dolly.py [INSTRUCTION] [--context TEXT] [--model NAME]

Dolly v2 is a Pythia (GPT-NeoX) that was trained on instructions in one fixed format:

    Below is an instruction that describes a task. Write a response that appropriately completes the request.

    ### Instruction:
    Name three colours.

    ### Response:
    Red, green and blue.

    ### End

"### Instruction:", "### Response:\n" and "### End" are single tokens of its vocabulary. The prompt ends after "### Response:\n", and the
answer at "### End", which is not the end-of-sequence token of its config: it has to be named as a stop token. What an instruction is
about ("Input:") stands between it and the response. dolly.jinja beside this file is the format as a chat template; the same by command:

    scripts/generate.py --chat "Name three colours." --model databricks/dolly-v2-3b --chat-template examples/dolly.jinja --stop "### End"
"""

import argparse
from pathlib import Path

from pjax import LLM, SamplingParams

TEMPLATE = Path(__file__).with_name("dolly.jinja")
END = "### End"


def as_message(instruction: str, context: str = "") -> dict[str, str]:
    """The user's message of an instruction and what it is about."""
    return {"role": "user", "content": f"{instruction}\n\nInput:\n{context}" if context else instruction}


def sampling_params(llm: LLM, max_tokens: int = 256) -> SamplingParams:
    """What Databricks' own pipeline samples with, ending at "### End"."""
    end = llm.get_tokenizer().token_to_id(END)
    ends = {"stop": [END]} if end is None else {"stop_token_ids": [end]}  # a tokenizer without that token spells it out
    return SamplingParams(temperature=1.0, top_p=0.92, seed=0, max_tokens=max_tokens, **ends)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("instruction", nargs="?", default="Explain to me the difference between nuclear fission and fusion.")
    parser.add_argument("--context", default="", help="a text that the instruction is about")
    parser.add_argument("--model", default="databricks/dolly-v2-3b", help="default: %(default)s; 7b and 12b take more memory")
    parser.add_argument("--max-tokens", type=int, default=256)
    args = parser.parse_args()
    llm = LLM(args.model, chat_template=TEMPLATE, max_num_seqs=1, max_num_batched_tokens=512, lazy=True)
    output = llm.chat([as_message(args.instruction, args.context)], sampling_params(llm, args.max_tokens))[0]
    print(output.outputs[0].text.strip())


if __name__ == "__main__":
    main()
