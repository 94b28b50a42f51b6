// A login link carries its token after "#", which browsers never send; it is put into the form and forgotten.
const token = location.hash.slice(1);
if (token) {
  history.replaceState(null, "", location.pathname);
  document.getElementById("token").value = token;
  document.getElementById("login").requestSubmit();
}
addEventListener("hashchange", () => location.reload());
