"""Ask a model about a repository that it has just read.

    python examples/ask_a_repository.py MODEL FOLDER QUESTION

MODEL is a folder or a name on the Hugging Face hub. Nothing is trained. What was read is kept in
FOLDER.memory, next to FOLDER, so that the next question finds it there.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import memorizing
from memorizing.data import load_corpus


def main(name: str, folder: str, question: str) -> None:
    """Read what is new in the folder, then answer."""
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    path = Path(folder).resolve()
    files = load_corpus(memorizing.DataConfig(corpus=f"files:{path}"))

    memory_folder = path.with_name(f"{path.name}.memory")
    if not memory_folder.exists():
        memorizing.add_memory(model)  # else the folder says which layers read it
    with memorizing.open_memory(model, memory_folder, tokenizer=tokenizer) as memory:
        report = memory.read(tokenizer, files.documents())
        print(f"read {report.num_documents} files, {report.num_tokens} tokens", file=sys.stderr)

        if tokenizer.chat_template:
            messages = [{"role": "user", "content": question}]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(question, return_tensors="pt")
        with memory.record() as sources:
            model.generate(
                **inputs,
                max_new_tokens=100,
                do_sample=False,
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
        for one in sources.passages:
            if one.document is not None:  # else it is the text itself
                lines = f"lines {one.first_line} to {one.last_line}"
                print(f"it read {one.document}, {lines}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:4])
