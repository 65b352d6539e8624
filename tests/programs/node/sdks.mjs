// In one process, for starting Node takes longest where guests are emulated.
import "./openai_sdk.mjs";
import "./anthropic_sdk.mjs";
