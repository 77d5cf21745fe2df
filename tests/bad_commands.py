"""Wrong command lines for ``bad_inputs.py``: what is written; indented, the sentence on standard error."""

COMMANDS = """
loki info nowhere/to/be/found
  error: cannot load a model from 'nowhere/to/be/found': there is no such folder; give a folder that save_pretrained wrote, or a name on the hub
loki info pictures
  error: cannot load a model from 'pictures': the folder has no config.json; give a folder that save_pretrained wrote, or a name on the hub
loki info unknown-model
  error: models of type 'nonesuch' are not supported: this version of transformers does not know them; a later one may
loki info code-model
  error: models of type 'nonesuch' are not supported: their code comes with the weights (trust_remote_code), and is not run
loki info deepseek
  error: models of type 'deepseek_v3' are not supported: latent attention (MLA) caches one compressed vector a token, not the keys of every head
loki info my-model --context 0
  error: context must be a whole number of tokens, at least 1; got 0
loki info qwen --basis my-basis
  error: this basis was calibrated for another model, with architecture LlamaForCausalLM where this model has Qwen3ForCausalLM; calibrate this model
loki calibrate no-weights --text book.txt -o new-basis
  error: cannot load a model from 'no-weights': the folder has no weights (model.safetensors); give a folder that save_pretrained wrote, or a name on the hub
loki calibrate no-tokenizer --text book.txt -o new-basis
  error: cannot load a tokenizer from 'no-tokenizer': the folder has no tokenizer.json; save the model's tokenizer there, with its save_pretrained
loki calibrate my-model --text nowhere.txt -o new-basis
  error: there is no text at nowhere.txt; give files or folders that exist
loki calibrate my-model --text short.txt -o new-basis
  error: the text has 8 tokens in all, too little for two windows of at least 64 (one to fit on, one held out): give more text
loki calibrate my-model --text book.txt -o my-basis
  error: my-basis holds a basis already; pass --overwrite to replace it, or name another folder
loki calibrate my-model --text book.txt -o pictures
  error: pictures exists and is not a basis; name another folder with -o
loki calibrate my-model --text book.txt -o new-basis --budget lots
  error: a budget of 'lots' is neither a percentage nor a token count; write 25% or 512
loki calibrate my-model --text book.txt -o new-basis --budget 120%
  error: a budget in percent must be above 0% and at most 100%; got '120%'
loki calibrate my-model --text book.txt -o new-basis --budget 16
  error: a budget of 16 tokens cannot hold 4 sinks and 32 recent tokens; give at least 36, or fewer sinks and recent
loki calibrate my-model --text book.txt -o new-basis --planes 16@5
  error: planes '16@5' are outside the grammar; write R@8, R@4, R@2 or R@4+M@2, such as '16@4+32@2' (R@16 and R@32 keep floats, for research)
loki calibrate my-model --text book.txt -o new-basis --tail long
  error: unknown tail 'long'; known: none, mean, linear
loki calibrate my-model --text book.txt -o new-basis --dtype int3
  error: unknown dtype 'int3'; known: float32, bfloat16, float16, auto
loki calibrate my-model --text book.txt -o new-basis --device toaster
  error: unknown device 'toaster'; give cpu, cuda, or cuda:1 for the second GPU
WORLD_SIZE=2 loki calibrate my-model --text book.txt -o new-basis
  error: WORLD_SIZE=2 tells of several processes, but there is no RANK and no MASTER_ADDR and no MASTER_PORT; start them with torchrun, or unset WORLD_SIZE for one process
loki inspect pictures
  error: pictures is not a basis: it holds no manifest.json; write one with `loki calibrate`
loki generate my-model --prompt-file prompt.txt
  error: method 'loki' needs a basis, got none; give --basis DIR (loki calibrate writes one)
loki generate my-model --basis my-basis --prompt-file nowhere.txt
  error: there is no prompt file at nowhere.txt; give a text file, or - for standard input
loki generate my-model --basis my-basis --prompt-file empty.txt
  error: the prompt has no tokens; give some text
loki generate my-model --basis my-basis --prompt-file latin1.txt
  error: latin1.txt is not text in UTF-8; give a text file as --prompt-file
loki generate my-model --basis nowhere --prompt-file prompt.txt
  error: no basis at nowhere: there is no such folder; write one with `loki calibrate`
loki generate my-model --basis my-basis --prompt-file prompt.txt --method lokki
  error: unknown method 'lokki'; known: dense, exact-topk, loki, streaming, pca-attn, paper-loki, random, h2o, snapkv, sparq, quest, double-sparsity (did you mean 'loki'?)
loki generate my-model --method streaming --prompt-file prompt.txt
  error: method 'streaming' without a basis needs a budget, got none; give --tokens 512 or 25%
loki generate my-model --method streaming --tokens 0.25 --prompt-file prompt.txt
  error: a budget of '0.25' is neither a percentage nor a token count; write 25% or 512
loki generate my-model --basis my-basis --prompt-file prompt.txt --max-new-tokens -3
  error: max_new_tokens must be a whole number of tokens, at least 1; got -3
loki generate my-model --basis my-basis --prompt-file prompt.txt --temperature -1
  error: temperature must be 0 (greedy) or above; got -1.0
loki generate my-model --basis my-basis --prompt-file prompt.txt --monitor-every 0
  error: monitor_every must be a whole number of decode steps, at least 1; got 0
loki generate fine-tuned --basis my-basis --prompt-file prompt.txt
  error: this basis was calibrated on other weights of the same architecture (a fine-tune?); calibrate this model, or pass other_weights=True (--other-weights) to use the basis all the same
loki evaluate my-model --tasks perplexety
  error: unknown task 'perplexety'; known: perplexity, retrieval, fidelity, lm-eval:TASK (did you mean 'perplexity'?)
loki evaluate my-model --tasks retrieval:multikey
  error: unknown family 'multikey'; known: single, multi-key, multi-value, multi-query, variable-tracking, common-words (did you mean 'multi-key'?)
loki evaluate my-model --basis my-basis --methods loki:tale=none
  error: unknown setting of loki 'tale'; known: planes, tail, per, candidate, dense, minimum, sinks, recent (did you mean 'tail'?)
loki evaluate my-model --methods loki --tasks perplexity --window 256 --windows 1
  error: method 'loki' needs a basis, got none; give --basis DIR (loki calibrate writes one)
loki evaluate my-model --budgets bytes=lots
  error: a budget of 'bytes=lots' is no share of dense attention's bytes; write bytes=1/8
loki evaluate my-model --tasks retrieval --lengths 8K
  error: a length of 8192 tokens; this model takes at least 2 and at most 512
loki evaluate my-model --text nowhere.txt
  error: nowhere.txt is not there; give the path of a text file or of a folder of text files
loki compare my-basis/manifest.json
  error: my-basis/manifest.json has no schema version; this version reads 1: write the results again
"""  # noqa: E501
