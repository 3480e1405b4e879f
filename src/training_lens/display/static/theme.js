// Light and dark: as the system has it, until the reader chooses.

import { redrawFigures } from "./drawing.js";

const SYSTEM = matchMedia("(prefers-color-scheme: dark)");
let chosen = recall();

/** Apply the theme, and let a button change it. */
export function setUpTheme(button) {
  const apply = () => {
    const theme = currentTheme();
    document.documentElement.dataset.theme = theme;
    button.textContent = theme === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", theme === "dark" ? "Use light colours" : "Use dark colours");
    redrawFigures();
  };
  button.addEventListener("click", () => {
    chosen = currentTheme() === "dark" ? "light" : "dark";
    remember(chosen);
    apply();
  });
  SYSTEM.addEventListener("change", apply);
  apply();
}

function currentTheme() {
  return chosen ?? (SYSTEM.matches ? "dark" : "light");
}

// A page that was opened from a file may have no storage.
function recall() {
  try {
    return localStorage.getItem("theme");
  } catch {
    return null;
  }
}

function remember(theme) {
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // It holds until the page is closed.
  }
}
