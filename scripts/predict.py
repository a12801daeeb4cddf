"""Classifies sentences from the command line, a file or standard input, and prints one line per sentence.

If the model folder has an ONNX file, neither torch nor transformers is imported. `bert-emotion`, of the installed
package, is the same command.

    python scripts/predict.py "i feel so happy that you came"
    python scripts/predict.py --file texts.txt --top_k 3
    python scripts/predict.py --model user/bert-emotion-ptq "i miss my old home"
    tail -f log.txt | python scripts/predict.py --json
"""

from emotion.inference.predict import main
from emotion.utils.command import run

if __name__ == "__main__":
    run(main)
