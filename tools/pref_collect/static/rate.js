// Keyboard, and saving without leaving the page before the server has confirmed.
"use strict";

const form = document.getElementById("rate");
const undo = document.getElementById("undo");
const problem = document.getElementById("problem");
const saveStatus = document.getElementById("status");
const keysOn = document.getElementById("keys-on");
let saving = false;

function choose(key) {
  const radio = form.querySelector(`input[name=choice][data-key="${key}"]`);
  if (!radio) return false;
  radio.checked = true;
  radio.focus({ preventScroll: true });
  problem.textContent = "";
  return true;
}

async function save() {
  if (saving) return;
  const data = new FormData(form);
  if (!data.get("choice")) {
    problem.textContent = "Choose an answer first.";
    return;
  }
  saving = true;
  form.setAttribute("aria-busy", "true");
  problem.textContent = "";
  saveStatus.textContent = "Saving…";
  try {
    const response = await fetch("/answer", {
      method: "POST",
      body: new URLSearchParams(data),
      headers: { Accept: "application/json" },
    });
    if (response.ok) {
      location.replace("/");
      return;
    }
    const said = await response.json().catch(() => ({}));
    problem.textContent = (said.error || "The server could not save this.") + " Your answer is still here.";
    if (response.status === 401) location.assign("/login");
  } catch {
    problem.textContent = "No connection: not saved yet. Your answer is still here; save again.";
  }
  saving = false;
  saveStatus.textContent = "";
  form.removeAttribute("aria-busy");
}

function write(part, field) {
  document.getElementById(part).open = true;
  document.getElementById(field).focus();
}

function onKey(event) {
  const writing = event.target.matches("textarea, input:not([type=radio]):not([type=checkbox])");
  if (event.isComposing || event.altKey) return;
  if (event.key === "Enter" && form && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    save();
    return;
  }
  if (event.ctrlKey || event.metaKey) return;
  if (writing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (keysOn && !keysOn.checked) return;
  const key = event.key.toLowerCase();
  const onControl = event.target.closest("button, summary, a");
  if (key === "u" && undo && !saving) undo.requestSubmit();
  else if (!form) return;
  else if (/^[0-9]$/.test(key)) choose(key);
  else if (key === "enter" && !onControl) save();
  else if (key === "r") write("reason-part", "reason");
  else if (key === "e") write("edited-part", "edited");
  else if (key === "a") form.querySelector(".small input")?.focus();
  else if (key === "?") document.getElementById("keys").open ^= true;
  else return;
  event.preventDefault();
}

function start() {
  document.addEventListener("keydown", onKey);
  document.getElementById("start").focus({ preventScroll: true });
  undo?.addEventListener("submit", (event) => {
    if (!undo.elements.answer_id.value) event.preventDefault();
  });
  if (!form) return;
  // Where storage is refused, the switch is simply not remembered.
  try {
    keysOn.checked = localStorage.getItem("keys") !== "off";
    keysOn.addEventListener("change", () => localStorage.setItem("keys", keysOn.checked ? "on" : "off"));
  } catch { /* private windows */ }
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    save();
  });
  form.addEventListener("change", (event) => {
    if (event.target.name === "choice") problem.textContent = "";
  });
  for (const button of form.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", () => {
      document.getElementById("edited").value = button.dataset.copy;
      document.getElementById("edited").focus();
    });
  }
}

start();
